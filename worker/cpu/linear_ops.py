"""Matmuls on a CPU, each by the fastest available implementation.

PyTorch sends float32 matmuls to MKL, which is slow on AMD processors. oneDNN is used instead,
except on Intel processors with MKL, where MKL is faster for operands that are not packed. On CPUs
with AMX, large matmuls run as bf16x3 in our own kernel (kernels/bf16x3_matmul.c). That is as exact
as float32, unless the other layers of the model are bfloat16 (`body_dtype`). bench/LOG.md has the
timings.

Sums are float32 in every case; only their order differs. Other devices, other dtypes, and a PyTorch
without the oneDNN operator fall back to PyTorch's own matmul.

On CPUs with bfloat16 instructions, layers can be told to round their operands to bfloat16, as
autocast does. Sums are always float32. `use_onednn` keeps weights, gradients and the activations
between layers in float32; `pack_weights` also rounds weights and results.

N rows, I input features, O output features.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from worker.cpu.kernels.bindings import TILE_DEPTH, Kernels, kernels

CPU_INFO = Path("/proc/cpuinfo")
# torch leaves is_available untyped
HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
HAS_ONEDNN = HAS_ONEDNN and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BFLOAT16: bool = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
IS_INTEL = "GenuineIntel" in CPU_INFO.read_text() if CPU_INFO.exists() else False
HAS_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # as above
PREFERS_ONEDNN = HAS_ONEDNN and not (IS_INTEL and HAS_MKL)  # for unpacked float32 operands
# the CPU has bfloat16 instructions; without them oneDNN emulates bfloat16
HAS_FAST_BFLOAT16: bool = HAS_BFLOAT16 and (
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)
# Training is faster with bfloat16 matmuls. Without AMX, it is not on Intel CPUs: there, bfloat16
# only saves memory traffic, which matters for a few rows of activations, as in decoding.
TRAINS_IN_BFLOAT16: bool = HAS_FAST_BFLOAT16 and (
    torch.cpu._is_amx_tile_supported() or not IS_INTEL
)
Activation = Literal["none", "swish"]
FLOAT32_PARTS, HALF_PARTS = 3, 2  # bfloat16 parts of a float32 number in a bf16x3 matmul
# smallest matmul that bf16x3 speeds up: rows * columns / (rows + columns), and the summed dimension
LEAST_SIDE, LEAST_DEPTH = 130, 64


def _num_parts(body_dtype: torch.dtype) -> int:
    """Returns the number of bfloat16 parts that suffices for float32 matmuls of the LM head."""
    return HALF_PARTS if body_dtype == torch.bfloat16 else FLOAT32_PARTS


def matmul(
    a_NI: Tensor,
    b_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    scratch_NO: Tensor | None = None,
    body_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns a b^T + bias, without autograd.

    `b_OI` may have any strides. `scratch_NO` is memory that may be used for the result.
    `body_dtype` is the dtype to which the other layers of the model round their operands. With
    bfloat16, only 16 of the 24 bits of a number are used where that is faster.
    """
    if (ops := _splits(a_NI, b_OI)) is not None:
        rows_NI = a_NI.reshape(-1, a_NI.shape[-1])
        product_NO = ops.multiply_split(
            _in_order(rows_NI), _in_order(b_OI), scratch_NO, num_parts=_num_parts(body_dtype)
        )
        product_NO = product_NO.view(*a_NI.shape[:-1], len(b_OI))
        return product_NO if bias_O is None else product_NO.add_(bias_O)
    if PREFERS_ONEDNN and _is_fast(a_NI, b_OI):
        return onednn_product(a_NI, b_OI, bias_O)
    if scratch_NO is not None and bias_O is None:
        return torch.mm(a_NI, b_OI.t(), out=scratch_NO)
    return nn.functional.linear(a_NI, b_OI, bias_O)


def weight_gradient(
    grad_NO: Tensor,
    x_NI: Tensor,
    *,
    onto_OI: Tensor | None = None,
    body_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns grad^T x, the weight gradient of a linear layer, without autograd.

    If `onto_OI` is given, the gradient is added to it in place. See `matmul` for `body_dtype`.
    """
    if (ops := _splits(grad_NO.t(), x_NI.t())) is not None:
        operands = (_in_order(grad_NO.t()), _in_order(x_NI.t()))
        num_parts = _num_parts(body_dtype)
        return ops.multiply_split(*operands, onto_OI, num_parts=num_parts, adds=onto_OI is not None)
    if PREFERS_ONEDNN and _is_fast(grad_NO, x_NI):
        gradient_OI = onednn_weight_gradient(grad_NO, x_NI)
        return gradient_OI if onto_OI is None else onto_OI.add_(gradient_OI)
    return grad_NO.t() @ x_NI if onto_OI is None else onto_OI.addmm_(grad_NO.t(), x_NI)


def _splits(a: Tensor, b: Tensor) -> Kernels | None:
    """Returns the kernels if a [..., K] times b^T [K, N] is fastest as bf16x3, else None.

    For small matmuls, packing the operands costs more than it saves.
    """
    if not _is_fast(a, b) or a.shape[-1] < LEAST_DEPTH or b.numel() == 0:
        return None
    num_rows, num_columns = a.numel() // a.shape[-1], len(b)
    if num_rows * num_columns < LEAST_SIDE * (num_rows + num_columns):
        return None
    ops = kernels()
    return ops if ops is not None and ops.has_splits else None


def _in_order(matrix: Tensor) -> Tensor:
    """Returns the matrix itself if one of its strides is 1, else a contiguous copy."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def onednn_product(a_NI: Tensor, b_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Computes `matmul` with oneDNN."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(a_NI, b_OI, bias_O, "none", [], "")
    return out


def onednn_weight_gradient(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """Computes `weight_gradient` with oneDNN; the result is float32 for any dtype of the operands.

    oneDNN has a primitive for it. A plain matmul would first copy the transposed gradient.
    """
    operands = (grad_NO.contiguous().to_mkldnn(), x_NI.contiguous().to_mkldnn())
    out: Tensor = torch.ops.aten.mkldnn_linear_backward_weights(*operands, _any_weight(), False)[0]
    return out.to_dense()


def _product(a_NI: Tensor, b_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Returns a b^T + bias in float32, for float32 or bfloat16 operands."""
    if a_NI.dtype == torch.float32:
        return matmul(a_NI, b_OI, bias_O)
    out_NO: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        a_NI, b_OI, None, "none", [], ""
    ).float()
    return out_NO if bias_O is None else out_NO.add_(bias_O)


@cache
def _any_weight() -> Tensor:
    """Returns a tensor from which the oneDNN operator takes only the type of its result."""
    weight: Tensor = torch.empty(1, 1).to_mkldnn()
    return weight


def linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Differentiable `torch.nn.functional.linear` with the fastest matmuls, forward and backward.

    Operands are rounded to `dtype`.
    """
    is_plain = dtype == torch.float32 and not PREFERS_ONEDNN and _splits(x, weight_OI) is None
    if is_plain or not _is_fast(x, weight_OI):
        return nn.functional.linear(x, weight_OI, bias_O)
    if not torch.is_grad_enabled():
        return _product(x.to(dtype), weight_OI.to(dtype), bias_O)
    # torch leaves apply untyped
    out: Tensor = _Linear.apply(x, weight_OI, bias_O, dtype)  # type: ignore[no-untyped-call]
    return out


def use_onednn(
    model: nn.Module, dtype: torch.dtype = torch.float32, exact: nn.Module | None = None
) -> None:
    """Switches a model's linear layers to the matmuls of this module, forward and backward.

    All layers except `exact` round their operands to `dtype`. Quantised layers, whose weights are
    subclasses of tensors, stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
            module.__class__ = OneDnnLinear
        elif type(module) is Conv1D:
            module.__class__ = OneDnnConv1D
        if isinstance(module, OneDnnLinear | OneDnnConv1D) and module is not exact:
            module.rounds_to = dtype


def pack_weights(
    model: nn.Module,
    *,
    keeps_plain: bool = True,
    dtype: torch.dtype = torch.float32,
    exact: nn.Module | None = None,
) -> int:
    """Packs the linear layers of a model that will not be trained; returns the bytes they take.

    The plain weights stay and must not change: large float32 matmuls read them, others the packed
    copies. With `keeps_plain=False` only those stay that other modules share (embeddings), and the
    model can only be called. With bfloat16, all layers except `exact` round weights, inputs and
    results to it, and sum in float32.
    """
    use_onednn(model)
    linears = [
        module for module in model.modules() if isinstance(module, OneDnnLinear | OneDnnConv1D)
    ]
    others = (
        module for module in model.modules() if not isinstance(module, OneDnnLinear | OneDnnConv1D)
    )
    shared = {id(weight) for module in others for weight in module.parameters(recurse=False)}
    num_bytes = 0
    for module in linears:
        module.requires_grad_(False)
        weight_OI = module.weight_OI.contiguous()
        if HAS_ONEDNN and weight_OI.dtype == torch.float32 and weight_OI.device.type == "cpu":
            weight_OI = weight_OI.to(torch.float32 if module is exact else dtype)
            module.packed = _pack(weight_OI)
            num_bytes += weight_OI.nbytes
            if not keeps_plain and id(module.weight) not in shared:
                release_weight(module)
    return num_bytes


def release_weight(module: nn.Module) -> None:
    """Replaces a layer's weight by an empty meta tensor of its shape and dtype.

    Other modules that share the weight keep it.
    """
    weight = module.get_parameter("weight")
    module.register_parameter(
        "weight", nn.Parameter(torch.empty_like(weight, device="meta"), False)
    )


PACKED_FOR_ROWS = 16  # a hint to oneDNN about later calls


class PackedWeight:
    """Weight in a packed layout, by default oneDNN's.

    A deep copy of the model drops it: PyTorch cannot copy it, and the copy's weights may change.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def matmul(self, x: Tensor, bias_O: Tensor | None, activation: Activation = "none") -> Tensor:
        """Returns activation(x W^T + bias) in the weight's dtype, without autograd."""
        bias_O = None if bias_O is None else bias_O.to(self.dtype)
        multiply = torch.ops.mkldnn._linear_pointwise.default
        out: Tensor = multiply(x.to(self.dtype), self.tensor, bias_O, activation, [], "")
        return out

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None


class TiledWeight(PackedWeight):
    """bfloat16 weight packed for our own kernel (kernels/tiled_matmul.c).

    It is faster for few rows, and the result of a row depends on that row alone.
    """

    def __init__(self, tiles: Tensor, num_out: int, ops: Kernels) -> None:
        super().__init__(tiles)
        self._num_out = num_out
        self._ops = ops

    def matmul(self, x: Tensor, bias_O: Tensor | None, activation: Activation = "none") -> Tensor:
        bias_O = None if bias_O is None else bias_O.float()
        x = x.to(torch.bfloat16).contiguous()
        return self._ops.multiply_tiles(
            x, self.tensor, self._num_out, bias_O, is_swish=activation == "swish"
        )


def _pack(weight_OI: Tensor) -> PackedWeight:
    ops = kernels() if weight_OI.dtype == torch.bfloat16 else None
    if ops is not None and ops.has_tiles and weight_OI.shape[1] % TILE_DEPTH == 0:
        return TiledWeight(ops.make_tiles(weight_OI), len(weight_OI), ops)
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACKED_FOR_ROWS))


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose class was replaced in place, so that weights, names and ties stay."""

    packed: PackedWeight | None = None
    rounds_to: torch.dtype = torch.float32

    @property
    def weight_OI(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return _apply(x, self, self.weight)


class OneDnnConv1D(Conv1D):  # type: ignore[misc]  # transformers is untyped here
    """GPT-2's linear layer, whose weight is stored transposed, [I, O]."""

    packed: PackedWeight | None = None
    rounds_to: torch.dtype = torch.float32

    @property
    def weight_OI(self) -> Tensor:
        weight_IO: Tensor = self.weight
        return weight_IO.t()

    def forward(self, x: Tensor) -> Tensor:
        return _apply(x, self, self.weight_OI)


def packed_weight(module: nn.Module) -> PackedWeight | None:
    """Returns the packed weight of a layer, or None if it has none."""
    return module.packed if isinstance(module, OneDnnLinear | OneDnnConv1D) else None


def multiplier(module: nn.Module, activation: Activation = "none") -> Callable[[Tensor], Tensor]:
    """Returns a function that computes a linear layer, followed by swish (SiLU) on request.

    It is for many calls of a layer that does not change, without autograd. A packed weight is
    called without the overhead of a module, and returns its own dtype: float32 or bfloat16.
    """
    packed = packed_weight(module)
    if packed is not None:
        bias_O: Any = module.bias
        return lambda x: packed.matmul(x, bias_O, activation)
    if activation == "none":
        return module
    return lambda x: nn.functional.silu(module(x))


def _apply(x: Tensor, layer: OneDnnLinear | OneDnnConv1D, weight_OI: Tensor) -> Tensor:
    bias_O: Tensor | None = layer.bias
    if layer.packed is not None and _is_fast(x) and not x.requires_grad:
        if layer.packed.dtype == torch.float32 and _splits(x, weight_OI) is not None:
            return matmul(x, weight_OI, bias_O)
        return layer.packed.matmul(x, bias_O).float()
    return linear(x, weight_OI, bias_O, layer.rounds_to)


def _is_fast(a: Tensor, b: Tensor | None = None) -> bool:
    return (
        HAS_ONEDNN
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and (b is None or (b.dtype == torch.float32 and b.device.type == "cpu"))
        and a.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Returns x W^T + bias in float32, with operands rounded to `dtype`."""
        # ctx is Any: torch does not type what a context carries
        x, weight_OI = x.to(dtype), weight_OI.to(dtype)
        ctx.save_for_backward(x, weight_OI)
        return _product(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, the weight and the bias."""
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        rounded_NO = grad_NO.to(x.dtype)
        in_weight = weight_gradient if x.dtype == torch.float32 else onednn_weight_gradient
        return (
            _product(rounded_NO, weight_OI.t()).view(x.shape) if needs_x else None,
            in_weight(rounded_NO, x_NI) if needs_weight else None,
            grad_NO.sum(dim=0) if needs_bias else None,
            None,
        )
