"""Speed of a card: matmuls by its data sheet and measured, and its memory by its data sheet."""

import time

import torch

from bench.gpu.memory import synchronize

# Dense bfloat16 operations per second, in 1e12, by a part of the card's name. The first match wins.
DATA_SHEET = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 125.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}
# Bytes per second of the memory.
BANDWIDTH = {
    "B200": 8.0e12,
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.04e12,
    "A100": 1.55e12,
    "L40S": 0.864e12,
    "A10G": 0.6e12,
    "L4": 0.3e12,
    "RTX 4090": 1.01e12,
}
MATMUL_SIZE, TOY_SIZE = 8192, 256
NUM_WARM, NUM_TIMED = 5, 20


def measured_tflops(device: str, dtype: torch.dtype, *, is_toy: bool) -> float:
    """Returns the speed of one large matmul, in 1e12 operations per second."""
    size = TOY_SIZE if is_toy else MATMUL_SIZE
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(NUM_WARM):
        one @ other
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(NUM_TIMED):
        one @ other
    synchronize(device)
    return 2e-12 * size**3 * NUM_TIMED / (time.perf_counter() - begun)


def peak_tflops(card: str, measured: float) -> float:
    """Returns the data sheet's speed of a card. For an unknown card it is the measured speed."""
    return next((speed for name, speed in DATA_SHEET.items() if name in card), measured)


def peak_bandwidth(card: str) -> float | None:
    """Returns the data sheet's bandwidth of a card, in bytes per second, if it is known."""
    return next((speed for name, speed in BANDWIDTH.items() if name in card), None)
