"""Python bindings of the C kernels, for operations that PyTorch runs slowly on a CPU.

- decode_ops.c: element-wise operations and attention of a decode step.
- tiled_matmul.c, int8_matmul.c: matmuls with packed weights.
- decoder_layers.c: all layers of a decode step in one call.
- bf16x3_matmul.c: float32 matmuls for training.
- norm_swiglu.c, causal_attention.c: layers in training.
- distill_loss.c: the loss from the logits.

The machine's C compiler builds the kernels once. `kernels` returns None without a compiler, on
systems other than Linux, and if PyTorch does not use GNU OpenMP. PyTorch operations then compute
the same. bench/LOG.md has the timings.
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
    """`struct layer` of decoder_layers.c: addresses of tensors (None if absent), and scalars."""

    WEIGHTS = ("qkv", "output", "gate", "up", "down")
    _fields_ = [
        *((name, POINTER) for name in ("attention_norm", "mlp_norm", *WEIGHTS, *(f"{w}_bias" for w in WEIGHTS))),
        *((name, POINTER) for name in ("keys", "values")),
        *((name, FLOAT) for name in ("attention_eps", "mlp_eps", "scaling")),
        ("is_rotated", ctypes.c_int32),
    ]  # fmt: skip


class Sizes(ctypes.Structure):
    """`struct sizes` of decoder_layers.c.

    N rows of Q tokens; E hidden size; H query heads and K key heads of width D; I width of the MLP;
    width and column of the KV cache; whether the weights are int8.
    """

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
NO_MEMORY, BAD_TARGET = 1, 2  # their error codes; 0 is success

LANES = 16  # floats of a vector; the weights of a causal attention are padded to it
TILE_SIDE, TILE_DEPTH = 16, 32  # output features and inputs of a weight tile
MARGIN = 4.0  # nats below the highest logit; such a token has 1/50 of the highest probability
MOST_REFINED = 1024  # logits per row


def _raise_failure(
    code: int, function: Any, arguments: tuple[Any, ...]
) -> int:  # Any: as ctypes declares it
    """Raises MemoryError or IndexError for the error code of a C function."""
    if code == NO_MEMORY:
        raise MemoryError(f"not enough memory for the workspace of {function.__name__}")
    if code == BAD_TARGET:
        raise IndexError("a target token is outside the vocabulary")
    return code


class Kernels:
    """The compiled functions, for contiguous CPU tensors in float32 or bfloat16.

    A function that needs working space raises MemoryError if there is none.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, ctypes.c_int if name in CAN_FAIL else None
            if name in CAN_FAIL:
                function.errcheck = _raise_failure
        self.has_tiles = bool(library.has_tiles())  # bfloat16 matmuls, with AMX or AVX-512
        self.has_int8 = bool(library.has_int8())  # int8 weights, with AVX-512
        self.has_splits = bool(library.has_splits())  # bf16x3 matmuls, with AMX only

    def make_tiles(self, weight_OI: Tensor) -> Tensor:
        """Packs a bfloat16 weight for `multiply_tiles`. I must be a multiple of 32."""
        num_out, num_in = weight_OI.shape
        assert num_in % TILE_DEPTH == 0
        tiles = torch.empty(-(-num_out // TILE_SIDE) * TILE_SIDE * num_in, dtype=torch.bfloat16)
        self._library.make_tiles(*_addresses(weight_OI, tiles), num_out, num_in)
        return tiles

    def multiply_tiles(
        self, x: Tensor, tiles: Tensor, num_out: int, bias_O: Tensor | None, *, is_swish: bool
    ) -> Tensor:
        """Returns x W^T + bias [..., O] in bfloat16, followed by swish on request.

        x is bfloat16, the bias float32. The result of a row depends on that row alone.
        """
        out = torch.empty((*x.shape[:-1], num_out), dtype=torch.bfloat16)
        num_in = x.shape[-1]
        self._library.multiply_tiles(
            *_addresses(x, tiles, bias_O, out), x.numel() // num_in, num_out, num_in, int(is_swish)
        )
        return out

    def multiply_int8(
        self, x: Tensor, packed: Tensor, num_out: int, bias_O: Tensor | None, *, is_swish: bool
    ) -> Tensor:
        """Same as `multiply_tiles`, for a weight from `worker.cpu.int8.pack_int8`."""
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
        """Returns a b^T, computed as bf16x3: written to `out_MN`, or added to it with `adds`.

        With three parts per number it is as exact as a float32 matmul; with two it keeps 16 of 24
        bits. Requires `has_splits`. Each operand, or its transpose, is contiguous. The result of a
        row depends on that row and b alone.
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
        """Adds delta to `hidden_NE` in place; returns the RMS norm times the weight in `dtype`."""
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
        """Computes a *= b in place and returns a."""
        self._library.multiply(a.data_ptr(), b.data_ptr(), KINDS[a.dtype], a.numel())
        return a

    def refine(self, rounded_NV: Tensor, hidden_NE: Tensor, weight_VE: Tensor) -> Tensor:
        """Returns float32 logits [N, V] whose highest values are exact.

        Logits up to MARGIN below the highest are recomputed in float32, at most MOST_REFINED per
        row. The others keep their bfloat16 value.
        """
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

        Replaces the student's logits by `factor` times the derivative of the loss. The divergence
        is forward KL, or Jensen-Shannon if `beta` is given, at temperature 1 and in float32. Every
        row needs a target: there is no ignore index.

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
        """Returns the RMS norm [..., E] times the weight, and the scale of each row [N]."""
        out, scales_N = torch.empty_like(x), torch.empty(x.numel() // len(weight_E))
        self._library.norm(
            *_addresses(x, weight_E), eps, *_addresses(out, scales_N), len(scales_N), len(weight_E)
        )
        return out, scales_N

    def norm_gradients(
        self, grad: Tensor, x: Tensor, weight_E: Tensor, scales_N: Tensor, *, needs_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of x and, if it is needed, of the weight."""
        grad_x = torch.empty_like(x)
        grad_weight_E = torch.empty_like(weight_E) if needs_weight else None
        self._library.norm_gradients(
            *_addresses(grad, x, weight_E, scales_N, grad_x, grad_weight_E),
            len(scales_N),
            len(weight_E),
        )
        return grad_x, grad_weight_E

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns silu(gate) * up in float32."""
        out = torch.empty_like(gate)
        self._library.swiglu(*_addresses(gate, up, out), out.numel())
        return out

    def swiglu_gradients(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of gate and up."""
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        self._library.swiglu_gradients(
            *_addresses(grad, gate, up, grad_gate, grad_up), grad.numel()
        )
        return grad_gate, grad_up

    def rotate(
        self, x_BTHD: Tensor, cos_PTD: Tensor, sin_PTD: Tensor, *, is_back: bool = False
    ) -> Tensor:
        """Applies rotary embeddings, or with `is_back` returns the gradient of their input.

        P is B, or 1 if all rows share positions.
        """
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
        """Returns causal attention [B, T, H, D], and weights [B, H, T, W] for the gradients.

        All are float32. D is a multiple of 16; W is T, rounded up to a multiple of 16.
        """
        (B, T, H, D), K = query_BTHD.shape, key_BTKD.shape[2]
        out_BTHD, weights = (
            torch.empty_like(query_BTHD),
            torch.empty(B, H, T, -(-T // LANES) * LANES),
        )
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
        """Returns the gradients of queries, keys and values, in their shapes."""
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
        """Adds M / N tokens per row to the cache; returns the attention of each token [M, H * D].

        `projected_MP` holds queries, keys and values [M, (H + 2K) * D]. `rotations_MD` holds
        cosines and sines, with the first half of the sines negated. The batch uses the first N rows
        of the cache. New keys and values go to `column` and the columns after it. A token of row n
        sees the columns from starts[n] up to its own. Tokens before the start of their row give
        zeros.
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
        """Runs all layers on M tokens, overwriting `hidden_ME`; returns the final norm [M, E]."""
        num_numbers = 2 * sizes.E + (2 * sizes.H + 2 * sizes.K) * sizes.D + 2 * sizes.I
        scratch = torch.empty(len(hidden_ME) * num_numbers, dtype=torch.bfloat16)
        out_ME = torch.empty_like(hidden_ME)
        self._library.forward(
            layers, len(layers), sizes, *_addresses(hidden_ME, *rotations_MD, starts_N, norm_E), eps,
            *_addresses(scratch, out_ME),
        )  # fmt: skip
        return out_ME


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    """Returns the data pointers. Tensors must be contiguous: C does not see strides."""
    assert all(each is None or each.is_contiguous() for each in tensors)
    return [None if each is None else each.data_ptr() for each in tensors]


@cache
def kernels() -> Kernels | None:
    """Returns the kernels, built at the first call, or None if that fails, which is logged."""
    library = load_library()
    return None if library is None else Kernels(library)
