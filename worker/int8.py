"""Linear layers whose weights are integers of 8 bits: a quarter of the memory, and products of integers on a CPU.

Each output feature has a scale of its own, and so has each row of the input, found when it comes: one scale for a
whole batch would be set by its largest outlier, and would make a row's answer depend on its neighbours.

N rows, I and O features in and out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from worker.gemm import OneDnnConv1D, OneDnnLinear, release_weight, use_onednn

LARGEST = 127
UNSIGNED_ZERO = 128  # oneDNN multiplies unsigned rows by signed weights
HAS_INT8: bool = (
    hasattr(torch.ops.onednn, "qlinear_pointwise") and "onednn" in torch.backends.quantized.supported_engines
)


class Int8Weight:
    """A weight in oneDNN's own layout for integers, and the scale of each output."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.scale_O = weight_OI.abs().amax(dim=1).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        whole_OI = (weight_OI / self.scale_O[:, None]).round_().to(torch.int8).contiguous()
        self.num_bytes = whole_OI.nbytes + self.scale_O.nbytes
        self.packed = torch.ops.onednn.qlinear_prepack(whole_OI, None)
        self._zeros_O = torch.zeros(len(self.scale_O), dtype=torch.int64)

    def product(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + bias, float32."""
        scale = x.abs().amax(dim=-1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        whole = (x / scale).round_().add_(UNSIGNED_ZERO).to(torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            whole, 1.0, UNSIGNED_ZERO, self.packed, self.scale_O, self._zeros_O, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        out.mul_(scale)
        return out if bias_O is None else out.add_(bias_O)


class Int8Linear(nn.Linear):
    """An nn.Linear whose class was swapped; of its weight only shape and float are left."""

    whole: Int8Weight

    def forward(self, x: Tensor) -> Tensor:
        return self.whole.product(x, self.bias)


class Int8Conv1D(Conv1D):  # type: ignore[misc]  # transformers is untyped here
    """GPT-2's linear layer."""

    whole: Int8Weight

    def forward(self, x: Tensor) -> Tensor:
        return self.whole.product(x, self.bias)


def quantize_weights(model: nn.Module, *, but: nn.Module | None = None) -> int:
    """Makes the float32 linear layers of a model on a CPU Int8 ones, all but one; returns the bytes they take.

    The model can be called from then on, and nothing more.
    """
    use_onednn(model)
    num_bytes = 0
    for module in model.modules():
        if isinstance(module, OneDnnLinear | OneDnnConv1D) and module is not but:
            layer: Any = module  # its class changes below
            layer.whole = Int8Weight(module.weight_OI.detach().float())
            num_bytes += layer.whole.num_bytes
            release_weight(module)
            layer.__class__ = Int8Conv1D if isinstance(module, OneDnnConv1D) else Int8Linear
    return num_bytes
