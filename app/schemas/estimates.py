"""Response body of POST /v1/fine_tuning/jobs/estimate."""

from typing import Literal

from pydantic import BaseModel


class EstimatedSeconds(BaseModel):
    """Seconds of a job by phase. `start` and `saving` are outside the phases of the training.

    teacher: Preparing the rows, and the teacher's answers and outputs.
    evaluation: During the training and at its end.
    saving: Checkpoints, and the model.
    """

    start: float
    teacher: float
    layer_fit: float
    training: float
    evaluation: float
    saving: float
    total: float


class WorkerCounts(BaseModel):
    """Number of train workers that are alive, and how many of them run a job."""

    alive: int
    busy: int


class QueueAhead(BaseModel):
    """Number of jobs that wait for a worker and would run before this one."""

    jobs_before: int


class JobEstimate(BaseModel):
    """Estimate of a job. Nothing is stored.

    num_rows: Training rows, without those that are held out.
    num_tokens: Tokens that all students of the job are trained on, over all epochs.
    num_steps: Steps of all students together.
    seconds: Time without waiting in the queue; null if no worker was ever measured.
    peak_memory_bytes: Memory of the run, on the GPU if the workers have one.
    disk_bytes: Disk space that must be free: checkpoints, the teacher's cache and the model.
    fits: Whether the memory of a worker that is alive and the disk suffice.
    notes: What the estimate rests on, and which defaults were chosen.
    """

    object: Literal["fine_tuning.job.estimate"] = "fine_tuning.job.estimate"
    num_rows: int
    num_tokens: int
    num_epochs: int
    num_steps: int
    seconds: EstimatedSeconds | None
    peak_memory_bytes: int
    disk_bytes: int
    fits: bool
    workers: WorkerCounts
    queue: QueueAhead
    notes: list[str]
