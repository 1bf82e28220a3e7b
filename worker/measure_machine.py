"""Measures a machine for estimates: `python -m worker.measure_machine` prints a `MachineProfile`.

It takes a few seconds, most of them to import PyTorch. A train worker runs it once for a machine,
while it is idle.
"""

import os
import sys
import time

import torch

from app.contracts.train_workers import MachineProfile
from app.settings import get_settings
from worker.cpu import TRAINS_IN_BFLOAT16

CPU_SIDE, CUDA_SIDE = 1536, 8192  # sides of the square matrices
LEAST_PRIORITY = 19
NUM_TIMED = 7  # the fastest counts: other processes can only slow a matmul down


def measure() -> MachineProfile:
    """Returns the profile of the first GPU, or of the CPU if there is none."""
    if torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        memory_bytes = torch.cuda.get_device_properties(0).total_memory
        return MachineProfile(
            device="cuda",
            flops=matmul_flops("cuda", CUDA_SIDE, has_bfloat16=has_bfloat16),
            has_bfloat16=has_bfloat16,
            memory_bytes=memory_bytes,
        )
    if num_threads := get_settings().num_threads:
        torch.set_num_threads(num_threads)
    flops = matmul_flops("cpu", CPU_SIDE, has_bfloat16=TRAINS_IN_BFLOAT16)
    return MachineProfile(device="cpu", flops=flops, has_bfloat16=TRAINS_IN_BFLOAT16)


def matmul_flops(device: str, side: int, *, has_bfloat16: bool) -> float:
    """Returns the floating-point operations per second of a square matmul."""
    dtype = torch.bfloat16 if has_bfloat16 else torch.float32
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    fastest = float("inf")
    for _ in range(NUM_TIMED):
        begun = time.perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for the GPU
        fastest = min(fastest, time.perf_counter() - begun)
    return 2 * side**3 / fastest


if __name__ == "__main__":
    os.nice(LEAST_PRIORITY)
    sys.stdout.write(measure().model_dump_json())
