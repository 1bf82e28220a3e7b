"""Linear layers with int8 weights: half the memory of bfloat16, and faster for few rows on a CPU.

There are two implementations. On CPUs with AVX-512 a C kernel is used (kernels/int8_matmul.c). Its
weights have one scale per output feature and block of 64 inputs, and its inputs stay bfloat16.
Elsewhere, or if the number of inputs is not a multiple of 32, oneDNN multiplies integers. Its
weights have one scale per output feature, and its inputs are quantised with one scale per row. A
single scale per batch would make the result of a row depend on the other rows.

N rows, I input and O output features; P panels of F = 32 output features, B blocks of K = 64
inputs, L lines of a panel.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from worker.cpu.kernels.bindings import TILE_DEPTH, Kernels, kernels
from worker.cpu.linear_ops import (
    Activation,
    OneDnnConv1D,
    OneDnnLinear,
    TiledWeight,
    release_weight,
    use_onednn,
)

LARGEST = 127
SIGN_BIT = 128
BLOCK_INPUTS = 64  # inputs that share a scale
PANEL_OUTPUTS = 32  # output features that are stored together
PACKED_AT_ONCE = 4096  # output features; bounds the temporary memory
UNSIGNED_ZERO = 128  # zero point of the inputs: oneDNN multiplies unsigned by signed integers
HAS_INT8: bool = (
    hasattr(torch.ops.onednn, "qlinear_pointwise")
    and "onednn" in torch.backends.quantized.supported_engines
)


def int8_kernels(num_inputs: int) -> Kernels | None:
    """Returns the kernels if they support int8 weights with this number of inputs, else None."""
    ops = kernels()
    return ops if ops is not None and ops.has_int8 and num_inputs % TILE_DEPTH == 0 else None


def quantize_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Returns integers from -127 to 127 [O, I] as int8, and the scales [O, B] in bfloat16."""
    blocks_OBK = _padded(weight_OI.float(), 1, BLOCK_INPUTS).view(len(weight_OI), -1, BLOCK_INPUTS)
    tiny = torch.finfo(torch.bfloat16).tiny
    scale_OB = (blocks_OBK.abs().amax(-1) / LARGEST).clamp_(min=tiny).bfloat16()
    # if bfloat16 rounds a scale down, the largest weight exceeds 127: clamp it
    whole_OBK = (blocks_OBK / scale_OB.float()[..., None]).round_().clamp_(-LARGEST, LARGEST)
    return whole_OBK.flatten(1)[:, : weight_OI.shape[1]].to(torch.int8), scale_OB


def pack_int8(weight_OI: Tensor) -> Tensor:
    """Quantises a weight and packs it for kernels/int8_matmul.c.

    Returns bytes, [P, bytes of a panel]. The number of inputs must be a multiple of 32.
    """
    assert weight_OI.shape[1] % TILE_DEPTH == 0
    return torch.cat(
        [_pack_features(some_OI) for some_OI in torch.split(weight_OI, PACKED_AT_ONCE)]
    )


def _pack_features(weight_OI: Tensor) -> Tensor:
    whole_OI, scale_OB = (_padded(each, 0, PANEL_OUTPUTS) for each in quantize_blocks(weight_OI))
    num_panels, num_in = len(whole_OI) // PANEL_OUTPUTS, whole_OI.shape[1]
    scale_PBF = scale_OB.view(num_panels, PANEL_OUTPUTS, -1).transpose(1, 2).contiguous()
    bytes_OI = whole_OI.abs().to(torch.uint8) | (whole_OI < 0).to(torch.uint8) * SIGN_BIT
    # A line of 64 bytes holds 16 features by two pairs of inputs. They are interleaved such that
    # unpacking the bytes separates the pairs. The permutation turns
    # [panel, half of panel, quarter of line, feature, line, pair, input] into
    # [panel, line, half of panel, quarter of line, pair, feature, input].
    sizes = (num_panels, 2, 4, 4, num_in // 4, 2, 2)
    lines_PLB = (
        bytes_OI.view(sizes).permute(0, 4, 1, 2, 5, 3, 6).reshape(num_panels, num_in // 4, -1)
    )
    blocks = torch.split(lines_PLB, BLOCK_INPUTS // 4, dim=1)
    parts = [
        part
        for number, block in enumerate(blocks)
        for part in (scale_PBF[:, number].view(torch.uint8), block.flatten(1))
    ]
    return torch.cat(parts, dim=1)


def _padded(x: Tensor, dim: int, multiple: int) -> Tensor:
    """Appends zeros up to the next multiple of a size."""
    num_missing = -x.shape[dim] % multiple
    padding = (0, 0) * (x.ndim - 1 - dim) + (0, num_missing)
    return nn.functional.pad(x, padding) if num_missing else x


class TiledInt8Weight(TiledWeight):
    """int8 weight packed for our own kernel.

    Its `dtype` is bfloat16, the dtype of its inputs and outputs.
    """

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def matmul(self, x: Tensor, bias_O: Tensor | None, activation: Activation = "none") -> Tensor:
        bias_O = None if bias_O is None else bias_O.float()
        x = x.to(torch.bfloat16).contiguous()
        return self._ops.multiply_int8(
            x, self.tensor, self._num_out, bias_O, is_swish=activation == "swish"
        )


@cache
def sums_saturate() -> bool:
    """Returns whether oneDNN adds pairs of products in 16 bits, as on CPUs without VNNI instructions.

    Such sums are wrong for inputs above 128.
    """
    inputs = torch.full((1, BLOCK_INPUTS), 255, dtype=torch.uint8)
    weight_OI = torch.full((1, BLOCK_INPUTS), LARGEST, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight_OI, None)
    total = _multiply_integers(inputs, 0, packed, torch.ones(1))
    return total.item() != BLOCK_INPUTS * 255 * LARGEST


def _multiply_integers(inputs: Tensor, zero: int, packed: Tensor, scale_O: Tensor) -> Tensor:
    zeros_O = torch.zeros(len(scale_O), dtype=torch.int64)
    out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        inputs, 1.0, zero, packed, scale_O, zeros_O, None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return out


class Int8Weight:
    """Weight packed by oneDNN for integer matmuls, with one scale per output feature."""

    def __init__(self, weight_OI: Tensor) -> None:
        tiny = torch.finfo(torch.float32).tiny
        self.scale_O = weight_OI.abs().amax(dim=1).div_(LARGEST).clamp_(min=tiny)
        whole_OI = (weight_OI / self.scale_O[:, None]).round_().to(torch.int8).contiguous()
        self.num_bytes = whole_OI.nbytes + self.scale_O.nbytes
        self.packed = torch.ops.onednn.qlinear_prepack(whole_OI, None)

    def matmul(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """Returns x W^T + bias in float32."""
        x = x.float()  # a scale rounded to bfloat16 would let the largest input exceed 127 and wrap
        scale = (
            x.abs()
            .amax(dim=-1, keepdim=True)
            .div_(LARGEST)
            .clamp_(min=torch.finfo(torch.float32).tiny)
        )
        whole = (x / scale).round_().add_(UNSIGNED_ZERO).to(torch.uint8)
        if sums_saturate():
            half = whole >> 1
            halves = torch.stack((half, whole - half))  # at most 128
            out = _multiply_integers(halves, UNSIGNED_ZERO // 2, self.packed, self.scale_O).sum(0)
        else:
            out = _multiply_integers(whole, UNSIGNED_ZERO, self.packed, self.scale_O)
        out.mul_(scale)
        return out if bias_O is None else out.add_(bias_O)


class Int8Linear(nn.Linear):
    """`nn.Linear` whose class was replaced in place.

    Its `weight` is an empty meta tensor that keeps only shape and dtype.
    """

    whole: Int8Weight

    def forward(self, x: Tensor) -> Tensor:
        return self.whole.matmul(x, self.bias)


class Int8Conv1D(Conv1D):  # type: ignore[misc]  # transformers is untyped here
    """GPT-2's linear layer, with its class replaced in the same way as `Int8Linear`."""

    whole: Int8Weight

    def forward(self, x: Tensor) -> Tensor:
        return self.whole.matmul(x, self.bias)


def quantize_weights(model: nn.Module, *, exact: nn.Module | None = None) -> int:
    """Quantises the float32 linear layers of a model on a CPU and returns the bytes they take.

    The layer `exact` is left as it is. Afterwards the model can be called, but not trained or copied.
    """
    use_onednn(model)
    return sum(
        _quantize(module)
        for module in model.modules()
        if isinstance(module, OneDnnLinear | OneDnnConv1D) and module is not exact
    )


def _quantize(module: OneDnnLinear | OneDnnConv1D) -> int:
    weight_OI = module.weight_OI.detach().float()
    num_out, num_in = weight_OI.shape
    ops = int8_kernels(num_in)
    if ops is not None:
        packed = pack_int8(weight_OI)
        module.packed = TiledInt8Weight(packed, num_out, ops)
        num_bytes = packed.nbytes
    else:
        layer: Any = module  # its class changes below
        layer.whole = Int8Weight(weight_OI)
        num_bytes = layer.whole.num_bytes
        layer.__class__ = Int8Conv1D if isinstance(module, OneDnnConv1D) else Int8Linear
    release_weight(module)
    return num_bytes
