"""C kernels for operations that PyTorch runs slowly on a CPU: element-wise operations (decode_ops.c), matmuls with packed
weights (tiled_matmul.c, int8_matmul.c) and all layers of a decode step in one call (decoder_layers.c). For training: matmuls (bf16x3_matmul.c),
layers (norm_swiglu.c, causal_attention.c) and the loss from the logits (distill_loss.c).

PyTorch runs these as many small operations; bench/LOG.md has the timings. The machine's C compiler builds the kernels
once. `kernels` returns None without a compiler, and on systems other than Linux with a PyTorch that uses GNU OpenMP;
PyTorch then computes the same.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from worker.cpu.kernels.build import load_library

KINDS = {torch.float32: 0, torch.bfloat16: 1}

POINTER, WHOLE, KIND, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "add_norm": [POINTER, POINTER, KIND, POINTER, FLOAT, POINTER, KIND, WHOLE, WHOLE],
    "multiply": [POINTER, POINTER, KIND, WHOLE],
    "refine": [*[POINTER] * 4, *[WHOLE] * 3, FLOAT, WHOLE],
    "make_tiles": [POINTER, POINTER, WHOLE, WHOLE],
    "multiply_tiles": [*[POINTER] * 4, *[WHOLE] * 3, KIND],
    "multiply_int8": [*[POINTER] * 4, *[WHOLE] * 3, KIND],
    "multiply_split": [*[POINTER, WHOLE, WHOLE] * 2, POINTER, *[WHOLE] * 3, KIND, KIND],
    "norm": [POINTER, POINTER, FLOAT, POINTER, POINTER, WHOLE, WHOLE],
    "norm_gradients": [*[POINTER] * 6, WHOLE, WHOLE],
    "swiglu": [*[POINTER] * 3, WHOLE],
    "swiglu_gradients": [*[POINTER] * 5, WHOLE],
    "rotate": [*[POINTER] * 4, *[WHOLE] * 4, KIND],
    "attend_causally": [*[POINTER] * 5, *[WHOLE] * 5, FLOAT],
    "attention_gradients": [*[POINTER] * 8, *[WHOLE] * 5, FLOAT],
    "distil": [*[POINTER] * 4, *[WHOLE] * 2, KIND, *[FLOAT] * 3],
    "attend": [POINTER, KIND, *[POINTER] * 4, KIND, *[POINTER] * 2, *[WHOLE] * 7, FLOAT],
}


class Layer(ctypes.Structure):
    """`struct layer` of decoder_layers.c: addresses of a layer's norms, tiles, biases (None: none), keys and values, and its numbers."""

    WEIGHTS = ("qkv", "output", "gate", "up", "down")
    _fields_ = [
        *((name, POINTER) for name in ("attention_norm", "mlp_norm", *WEIGHTS, *(f"{w}_bias" for w in WEIGHTS))),
        *((name, POINTER) for name in ("keys", "values")),
        *((name, FLOAT) for name in ("attention_eps", "mlp_eps", "scaling")),
        ("is_rotated", ctypes.c_int32),
    ]  # fmt: skip


class Sizes(ctypes.Structure):
    """`struct sizes` of decoder_layers.c: rows, tokens of each, hidden size, query and key heads and their width, MLP's width, the cache's width and column, whether weights are int8."""

    _fields_ = [
        (name, WHOLE) for name in ("N", "Q", "E", "H", "K", "D", "I", "width", "column", "is_int8")
    ]


SIGNATURES["forward"] = [POINTER, WHOLE, Sizes, *[POINTER] * 5, FLOAT, POINTER, POINTER]

CAN_FAIL = frozenset(
    {
        "multiply_split",
        "norm_gradients",
        "attend_causally",
        "attention_gradients",
        "distil",
        "attend",
        "forward",
    }
)
NO_MEMORY, BAD_TARGET = 1, 2  # what they return beside 0

TILE_SIDE, TILE_DEPTH = 16, 32  # features and inputs of a tile of weights
MARGIN = 4.0  # in nats: what lies below the best by more has a fiftieth of its weight
MOST_REFINED = 1024  # of a row


def _raise_failure(
    code: int, function: Any, arguments: tuple[Any, ...]
) -> int:  # Any: as ctypes has it
    """Raises MemoryError or IndexError for what a C function returned."""
    if code == NO_MEMORY:
        raise MemoryError(f"no memory for the working space of {function.__name__}")
    if code == BAD_TARGET:
        raise IndexError("a target token is outside the vocabulary")
    return code


class Kernels:
    """The compiled functions over tensors: contiguous ones on the CPU, in float32 or bfloat16.

    Functions that need memory beside their tensors raise MemoryError when there is none.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, ctypes.c_int if name in CAN_FAIL else None
            if name in CAN_FAIL:
                function.errcheck = _raise_failure
        self.has_tiles = bool(library.has_tiles())  # products of bfloat16, by AMX or AVX-512
        self.has_int8 = bool(library.has_int8())  # int8 weights, by AVX-512
        self.has_splits = bool(library.has_splits())  # of float32, by AMX alone

    def make_tiles(self, weight_OI: Tensor) -> Tensor:
        """A weight in bfloat16 as `multiply_tiles` reads it. I has to be a multiple of 32."""
        num_out, num_in = weight_OI.shape
        assert num_in % TILE_DEPTH == 0
        tiles = torch.empty(-(-num_out // TILE_SIDE) * TILE_SIDE * num_in, dtype=torch.bfloat16)
        self._library.make_tiles(*_addresses(weight_OI, tiles), num_out, num_in)
        return tiles

    def multiply_tiles(
        self, x: Tensor, tiles: Tensor, num_out: int, bias_O: Tensor | None, *, is_swish: bool
    ) -> Tensor:
        """x W^T + bias [..., O] in bfloat16, then swish if asked; x in bfloat16, the bias in float32. A row's result depends on that row alone."""
        out = torch.empty((*x.shape[:-1], num_out), dtype=torch.bfloat16)
        num_in = x.shape[-1]
        self._library.multiply_tiles(
            *_addresses(x, tiles, bias_O, out), x.numel() // num_in, num_out, num_in, int(is_swish)
        )
        return out

    def multiply_int8(
        self, x: Tensor, packed: Tensor, num_out: int, bias_O: Tensor | None, *, is_swish: bool
    ) -> Tensor:
        """Returns x W^T + bias [..., O] in bfloat16, followed by swish on request.

        x is bfloat16, the bias float32, and `packed` comes from `worker.cpu.int8.pack_int8`. A row's result depends on that row alone.
        """
        out = torch.empty((*x.shape[:-1], num_out), dtype=torch.bfloat16)
        num_in = x.shape[-1]
        self._library.multiply_int8(
            *_addresses(x, packed, bias_O, out), x.numel() // num_in, num_out, num_in, int(is_swish)
        )
        return out

    def multiply_split(
        self,
        a_MK: Tensor,
        b_NK: Tensor,
        out_MN: Tensor | None = None,
        *,
        num_parts: int = 3,
        adds: bool = False,
    ) -> Tensor:
        """a b^T in float32, as exact as float32 products are, or with two parts of each number to 16 bits of its 24.

        Written into, or added to, `out` if there is one.

        Only where `has_splits`. Each operand is contiguous, or the transposed of what is. A row's result
        depends on that row and b alone.
        """
        (num_rows, depth), num_columns = a_MK.shape, len(b_NK)
        out_MN = torch.empty(num_rows, num_columns) if out_MN is None else out_MN
        assert min(num_rows, depth, num_columns) > 0
        assert out_MN.is_contiguous()
        assert all(1 in each.stride() for each in (a_MK, b_NK))
        self._library.multiply_split(
            a_MK.data_ptr(), *a_MK.stride(), b_NK.data_ptr(), *b_NK.stride(), out_MN.data_ptr(),
            num_rows, num_columns, depth, num_parts, int(adds),
        )  # fmt: skip
        return out_MN

    def add_norm(
        self,
        hidden_NE: Tensor,
        delta_NE: Tensor | None,
        weight_E: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """hidden += delta in place; gives its RMS norm times the weight [N, E] in `dtype`."""
        out_NE = torch.empty(hidden_NE.shape, dtype=dtype)
        delta, kind = (
            (None, 0) if delta_NE is None else (delta_NE.data_ptr(), KINDS[delta_NE.dtype])
        )
        self._library.add_norm(
            hidden_NE.data_ptr(),
            delta,
            kind,
            weight_E.data_ptr(),
            eps,
            out_NE.data_ptr(),
            KINDS[dtype],
            *hidden_NE.shape,
        )
        return out_NE

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a *= b."""
        self._library.multiply(a.data_ptr(), b.data_ptr(), KINDS[a.dtype], a.numel())
        return a

    def refine(self, rounded_NV: Tensor, hidden_NE: Tensor, weight_VE: Tensor) -> Tensor:
        """Logits [N, V] in float32: the best of a row, up to MARGIN below the greatest, exact, the others as rounded to bfloat16."""
        out_NV = torch.empty(rounded_NV.shape)
        self._library.refine(
            *_addresses(rounded_NV, hidden_NE, weight_VE, out_NV), *rounded_NV.shape, hidden_NE.shape[-1], MARGIN, MOST_REFINED,
        )  # fmt: skip
        return out_NV

    def distil(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor,
        targets_N: Tensor,
        *,
        beta: float | None,
        ce_weight: float,
        factor: float,
    ) -> Tensor:
        """Returns loss, KL, cross-entropy and agreement per row [N, 4].

        The student's logits are replaced by factor times the loss's derivative. The divergence is forward KL, or with a
        beta the Jensen-Shannon divergence, at temperature 1; all in float32. Every row has a target: there is no
        ignore index.

        Raises:
            IndexError: A target is not in the vocabulary. The logits are left as they are.
        """
        assert student_NV.shape == teacher_NV.shape, "both have a logit for every token"
        assert targets_N.shape == student_NV.shape[:1], "each row has a target"
        assert targets_N.dtype == torch.int64
        terms_N4 = torch.empty(len(targets_N), 4)
        self._library.distil(
            *_addresses(student_NV, teacher_NV, targets_N, terms_N4), *student_NV.shape,
            int(beta is not None), beta or 0.0, ce_weight, factor,
        )  # fmt: skip
        return terms_N4

    def norm(self, x: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The RMS norm of the states [..., E] times the weight, and each state's factor [N]; all in float32."""
        out, scales_N = torch.empty_like(x), torch.empty(x.numel() // len(weight_E))
        self._library.norm(
            *_addresses(x, weight_E), eps, *_addresses(out, scales_N), len(scales_N), len(weight_E)
        )
        return out, scales_N

    def norm_gradients(
        self, grad: Tensor, x: Tensor, weight_E: Tensor, scales_N: Tensor, *, needs_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """In x and, if asked for, in the weight."""
        grad_x, grad_weight_E = (
            torch.empty_like(x),
            torch.empty_like(weight_E) if needs_weight else None,
        )
        self._library.norm_gradients(
            *_addresses(grad, x, weight_E, scales_N, grad_x, grad_weight_E),
            len(scales_N),
            len(weight_E),
        )
        return grad_x, grad_weight_E

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, in float32."""
        out = torch.empty_like(gate)
        self._library.swiglu(*_addresses(gate, up, out), out.numel())
        return out

    def swiglu_gradients(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """In gate and in up."""
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        self._library.swiglu_gradients(
            *_addresses(grad, gate, up, grad_gate, grad_up), grad.numel()
        )
        return grad_gate, grad_up

    def rotate(
        self, x_BTHD: Tensor, cos_PTD: Tensor, sin_PTD: Tensor, *, is_back: bool = False
    ) -> Tensor:
        """Rotary positions, of P = B rows or one for all; or the gradient in what was turned."""
        out_BTHD = torch.empty_like(x_BTHD)
        B, T, heads, D = x_BTHD.shape
        self._library.rotate(
            *_addresses(x_BTHD, cos_PTD, sin_PTD, out_BTHD),
            B * T,
            cos_PTD.numel() // D,
            heads,
            D,
            int(is_back),
        )
        return out_BTHD

    def attend_causally(
        self, query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """What each token finds up to itself [B, T, H, D], and the weights [B, H, T, W] for `attention_gradients`; float32, D a multiple of 16."""
        (B, T, H, D), K = query_BTHD.shape, key_BTKD.shape[2]
        out_BTHD, weights = torch.empty_like(query_BTHD), torch.empty(B, H, T, -(-T // 16) * 16)
        operands = _addresses(query_BTHD, key_BTKD, value_BTKD, out_BTHD, weights)
        self._library.attend_causally(*operands, B, T, H, K, D, scaling)
        return out_BTHD, weights

    def attention_gradients(
        self,
        grad_BTHD: Tensor,
        operands: tuple[Tensor, Tensor, Tensor],
        weights: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In queries, keys and values, shaped like them."""
        (B, T, H, D), K = grad_BTHD.shape, operands[1].shape[2]
        grads = (
            torch.empty_like(operands[0]),
            torch.empty_like(operands[1]),
            torch.empty_like(operands[2]),
        )
        pointers = _addresses(grad_BTHD, *operands, weights, *grads)
        self._library.attention_gradients(*pointers, B, T, H, K, D, scaling)
        return grads

    def attend(
        self,
        projected_MP: Tensor,
        rotations_MD: tuple[Tensor, Tensor] | None,
        cache_NKWD: tuple[Tensor, Tensor],
        starts_N: Tensor,
        *,
        num_heads: int,
        column: int,
        scaling: float,
    ) -> Tensor:
        """M / N tokens a row: writes keys and values from the column on, gives what each one's queries find up to its own [M, H * D].

        projected: queries, keys and values [M, (H + 2K) * D]; rotations: cosines and sines, the latter's first half negated; the
        cache: keys and values of the batch's rows from the first on, of which row n sees columns from starts[n] on. Tokens before
        a row's start find zeros.
        """
        keys, values = cache_NKWD
        num_rows, (num_key_heads, width, head_width) = len(starts_N), keys.shape[1:]
        num_tokens = len(projected_MP) // num_rows
        out_ME = torch.empty((len(projected_MP), num_heads * head_width), dtype=projected_MP.dtype)
        self._library.attend(
            *_addresses(projected_MP), KINDS[projected_MP.dtype], *_addresses(*(rotations_MD or (None, None)), keys, values),
            KINDS[keys.dtype], *_addresses(starts_N, out_ME), num_rows, num_tokens, num_heads, num_key_heads, head_width, width,
            column, scaling,
        )  # fmt: skip
        return out_ME

    def forward(
        self,
        layers: "ctypes.Array[Layer]",
        sizes: Sizes,
        hidden_ME: Tensor,
        rotations_MD: tuple[Tensor, Tensor],
        starts_N: Tensor,
        norm_E: Tensor,
        eps: float,
    ) -> Tensor:
        """Rows of Q tokens, M in all, through all layers by one team of threads: the last norm of their states [M, E]. `hidden` is used up."""
        num_numbers = 2 * sizes.E + (2 * sizes.H + 2 * sizes.K) * sizes.D + 2 * sizes.I
        scratch = torch.empty(len(hidden_ME) * num_numbers, dtype=torch.bfloat16)
        out_ME = torch.empty_like(hidden_ME)
        self._library.forward(
            layers, len(layers), sizes, *_addresses(hidden_ME, *rotations_MD, starts_N, norm_E), eps,
            *_addresses(scratch, out_ME),
        )  # fmt: skip
        return out_ME


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    """Where the numbers lie; C sees memory, not strides."""
    assert all(each is None or each.is_contiguous() for each in tensors)
    return [None if each is None else each.data_ptr() for each in tensors]


@cache
def kernels() -> Kernels | None:
    """Built and loaded at the first call; None where that cannot be done, which is logged."""
    library = load_library()
    return None if library is None else Kernels(library)
