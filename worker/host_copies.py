"""Copies of tensors from the CPU to a GPU for which the host does not wait."""

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
