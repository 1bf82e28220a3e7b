"""Copies of tensors between CPU and GPU for which the host does not wait."""

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Moves a tensor from the CPU to a device. The host does not wait for the copy.

    Only a copy from pinned memory is asynchronous. Any other one waits for all work that the GPU
    has still to do.
    """
    if torch.device(device).type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_into(target: Tensor, tensor: Tensor) -> None:
    """Copies a tensor of the CPU into one of a device. The host does not wait for the copy."""
    if target.device.type == "cpu":
        target.copy_(tensor)
    else:
        target.copy_(tensor.pin_memory(), non_blocking=True)


@dataclass(frozen=True)
class HostCopy:
    """Copy of a tensor to the CPU. The host waits for it only when it reads it.

    It does not wait for work that was given to the GPU after the copy.
    """

    tensor: Tensor
    done: torch.cuda.Event | None

    @classmethod
    def of(cls, tensor: Tensor) -> "HostCopy":
        """Begins the copy of a tensor. A tensor on the CPU is not copied."""
        if tensor.device.type == "cpu":
            return cls(tensor, None)
        copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        done.record()
        return cls(copy, done)

    def read(self) -> Tensor:
        """Waits for the copy and returns it."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensor
