"""Memory of the device that serves: its default limit, and what to do when it is exhausted."""

from typing import Final

import torch

DEFAULT_CPU_BYTES: Final = 4 * 2**30
# Share of the free memory of a CUDA device for models and their KV caches. The rest is for
# activations and for the allocator.
CUDA_SHARE: Final = 0.85
# Allocation failures that are not of a class of their own: of PyTorch's CPU allocator, and cuBLAS.
MESSAGES: Final = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def resident_bytes(limit_bytes: int, device: str) -> int:
    """Returns the limit of a serve worker for its models and their KV caches.

    If `limit_bytes` is 0, it follows the device: a share of the free memory of a CUDA device, or
    `DEFAULT_CPU_BYTES` on a CPU.
    """
    if limit_bytes:
        return limit_bytes
    if device == "cpu":
        return DEFAULT_CPU_BYTES
    free_bytes, _ = torch.cuda.mem_get_info()
    return int(CUDA_SHARE * free_bytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation has failed, on a CPU or on a CUDA device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


def release_unused() -> None:
    """Returns memory that PyTorch keeps for later tensors to the CUDA device."""
    torch.cuda.empty_cache()  # does nothing if CUDA is not initialised
