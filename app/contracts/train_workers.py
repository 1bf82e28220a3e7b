"""Heartbeats of train workers, and the measured speed of their machines."""

from typing import Literal

from pydantic import ConfigDict

from app.contracts.messages import Contract


def train_worker_key(worker_id: str) -> str:
    """Returns the Redis key of a train worker's heartbeat, a `TrainWorkerStatus` with a TTL."""
    return f"stillhouse:train:{worker_id}"


class MachineProfile(Contract):
    """Measured properties of a machine: of its GPU if it has one, else of its CPU.

    flops: Floating-point operations per second of a large matmul, in bfloat16 if `has_bfloat16`.
    memory_bytes: Memory of the GPU; 0 on a CPU.
    """

    device: Literal["cpu", "cuda"]
    flops: float
    has_bfloat16: bool
    memory_bytes: int = 0


class TrainWorkerStatus(Contract):
    """Heartbeat of a train worker. Fields that other versions of the worker send are ignored.

    memory_bytes: Memory that its processes may use: that of the machine, or of its container.
    job_id: The job that it runs; None while it is idle.
    profile: None until the machine was measured.
    num_devices: Most CUDA devices that a job may ask for. None if it may ask for any number: without
        CUDA devices, or if a setting of the worker replaces the number of the job.
    """

    model_config = ConfigDict(extra="ignore")

    worker_id: str
    memory_bytes: int
    job_id: str | None = None
    profile: MachineProfile | None = None
    num_devices: int | None = None
    beat_at: float
