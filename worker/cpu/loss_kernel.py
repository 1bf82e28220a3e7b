"""The distillation loss from the logits, in one compiled pass (kernels/distill_loss.c)."""

from typing import Protocol

import torch
from torch import Tensor

from worker.cpu.kernels.bindings import kernels


class LossKernel(Protocol):
    """Computes loss and gradient of some rows; `Kernels.distil` describes the arguments."""

    def __call__(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor,
        targets_N: Tensor,
        *,
        beta: float | None,
        ce_weight: float,
        factor: float,
    ) -> Tensor:
        """Returns loss, KL, cross-entropy and agreement per row [N, 4]."""
        ...


def loss_kernel(logits_NV: Tensor) -> LossKernel | None:
    """Returns the compiled loss if it supports the dtype and the device of the logits."""
    is_float32 = logits_NV.dtype == torch.float32 and logits_NV.device.type == "cpu"
    ops = kernels() if is_float32 else None
    return None if ops is None else ops.distil
