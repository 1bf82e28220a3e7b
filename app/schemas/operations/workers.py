"""Response body of /v1/workers."""

from typing import Literal

from pydantic import BaseModel

from app.contracts.generation import EngineName, LoadedWeights


class ResidentModel(BaseModel):
    """A model that a serve worker has loaded, is loading or could not load.

    model: Null for a model of another project, and for a checkpoint.
    bytes: Size in memory if it is resident, else size in the artifact store.
    """

    model: str | None
    state: Literal["loading", "resident", "failed"]
    bytes: int
    percent: float
    weights: LoadedWeights | None
    first_token_ms: float | None
    is_pinned: bool
    error: str | None


class ServeWorkerObject(BaseModel):
    """A serve worker according to its last heartbeat. Counts are numbers of sequences.

    state: `stalled` means that it has had work for a long time without a forward pass.
    resident_bytes, max_resident_bytes: Memory of its models with their KV caches, and the limit of the worker.
    """

    id: str
    object: Literal["serve_worker"] = "serve_worker"
    state: Literal["ready", "stalled", "draining"]
    engines: list[EngineName]
    num_running: int
    num_waiting: int
    max_running: int
    resident_bytes: int
    max_resident_bytes: int
    heartbeat_age_seconds: float
    stalled_seconds: float
    models: list[ResidentModel]


class RunningJobObject(BaseModel):
    """A running job, and the worker that holds its lease.

    is_late: Whether no heartbeat has arrived for more than 10 seconds after it was due.
    lease_seconds: Time until the lease ends if no heartbeat renews it.
    """

    id: str
    object: Literal["running_job"] = "running_job"
    kind: str
    name: str
    worker: str
    attempt: int
    stage: str | None
    percent: float | None
    heartbeat_age_seconds: float
    is_late: bool
    lease_seconds: float


class WorkersObject(BaseModel):
    """All serve workers, the running jobs that the key may see, and the number of all of them."""

    object: Literal["workers"] = "workers"
    serve_workers: list[ServeWorkerObject]
    running_jobs: list[RunningJobObject]
    num_running_jobs: int
