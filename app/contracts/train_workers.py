"""Heartbeats of train workers, and the measured speed of their machines."""

from typing import Final, Literal

from pydantic import ConfigDict

from app.contracts.distillation import TeacherPrecision
from app.contracts.messages import Contract

# The package that quantises teachers, which the extra `quantized` installs on train workers.
QUANTIZATION_PACKAGE: Final = "torchao"
# The least compute capability of a GPU for each precision of a teacher.
LEAST_CAPABILITY: Final[dict[TeacherPrecision, tuple[int, int]]] = {
    "int8": (0, 0),
    "int4": (8, 0),
    "fp8": (8, 9),
}
CPU_PRECISIONS: Final[tuple[TeacherPrecision, ...]] = ("int8", "int4")


def supported_precisions(
    *, has_package: bool, capability: tuple[int, int] | None
) -> tuple[TeacherPrecision, ...]:
    """Returns the formats to which a machine can quantise a teacher.

    `capability` is the compute capability of its GPU. None: it has no GPU.
    """
    if not has_package:
        return ()
    if capability is None:
        return CPU_PRECISIONS
    return tuple(name for name, least in LEAST_CAPABILITY.items() if capability >= least)


def precision_needs(precision: TeacherPrecision) -> str:
    """Returns what a train worker must have for a precision, as a part of a sentence."""
    package = f'the package {QUANTIZATION_PACKAGE} (pip install ".[worker,quantized]")'
    major, minor = LEAST_CAPABILITY[precision]
    if not major:
        return package
    gpu = f"a GPU with compute capability {major}.{minor} or higher"
    return f"{package} and {gpu}{', or no GPU' if precision in CPU_PRECISIONS else ''}"


def train_worker_key(worker_id: str) -> str:
    """Returns the Redis key of a train worker's heartbeat, a `TrainWorkerStatus` with a TTL."""
    return f"stillhouse:train:{worker_id}"


class MachineProfile(Contract):
    """Measured properties of a machine: of its GPU if it has one, else of its CPU.

    flops: Floating-point operations per second of a large matmul, in bfloat16 if `has_bfloat16`.
    memory_bytes: Memory of the GPU; 0 on a CPU.
    load: Load average per core before the measurement, which other processes slow down.
    """

    device: Literal["cpu", "cuda"]
    flops: float
    has_bfloat16: bool
    memory_bytes: int = 0
    load: float = 0.0


class TrainWorkerStatus(Contract):
    """Heartbeat of a train worker. Fields that other versions of the worker send are ignored.

    memory_bytes: Memory that its processes may use: that of the machine, or of its container.
    job_id: The job that it runs; None while it is idle.
    profile: None until the machine was measured.
    num_devices: Most CUDA devices that a job may ask for. None if it may ask for any number: without
        CUDA devices, or if a setting of the worker replaces the number of the job.
    teacher_precisions: Formats to which it can quantise a teacher. None if it cannot tell.
    """

    model_config = ConfigDict(extra="ignore")

    worker_id: str
    memory_bytes: int
    job_id: str | None = None
    profile: MachineProfile | None = None
    num_devices: int | None = None
    teacher_precisions: tuple[str, ...] | None = None
    beat_at: float
