"""Peak memory: of the GPU, or of this process on a CPU."""

import gc
from pathlib import Path

import torch

from app.contracts.job_seconds import Phase
from bench.process import peak_bytes as process_peak_bytes
from worker.distill.phase_times import PhaseTimes

GIB = 2**30
RESET_PEAK = "5"  # proc(5): resets VmHWM to the present resident size


def synchronize(device: str) -> None:
    """Waits for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Frees the memory of objects that are no longer used, so that other processes can have it."""
    gc.collect()  # modules form reference cycles
    if device == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    """Starts a new measurement of the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)


def peak_bytes(device: str) -> int:
    """Returns the most bytes in use since the last reset: by tensors on a GPU, else resident."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return process_peak_bytes()


class MeasuredPhases(PhaseTimes):
    """Phases of a run with their peak memory. A phase ends when the GPU has done its work."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.peak_bytes: dict[Phase, int] = {}
        reset_peak(device)
        super().__init__()

    def _count(self) -> None:
        synchronize(self.device)
        phase = self._phases[-1]
        self.peak_bytes[phase] = max(self.peak_bytes.get(phase, 0), peak_bytes(self.device))
        reset_peak(self.device)
        super()._count()
