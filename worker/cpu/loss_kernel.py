"""The distillation loss from the logits, in one compiled pass (kernels/distill_loss.c)."""

from collections.abc import Callable

import torch
from torch import Tensor

from worker.cpu.kernels.bindings import kernels

LossKernel = Callable[..., Tensor]  # `Kernels.distil`, which describes the arguments


def loss_kernel(logits_NV: Tensor) -> LossKernel | None:
    """Returns the compiled loss if it supports the dtype and the device of the logits."""
    is_float32 = logits_NV.dtype == torch.float32 and logits_NV.device.type == "cpu"
    ops = kernels() if is_float32 else None
    return None if ops is None else ops.distil
