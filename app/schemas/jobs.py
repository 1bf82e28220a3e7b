"""Request and response bodies of /v1/fine_tuning/jobs: OpenAI's objects with additional fields."""

import time
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.contracts.distillation import NO_NUL, Auto, Distillation, FileId
from app.contracts.messages import DistillationJob, JobFailure, JobStatus
from app.db.schema.tables import Checkpoint, Event, Job

Json = dict[str, Any]  # Any: metrics, results and event data are open-ended JSON
ModelId = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=NO_NUL)]
Suffix = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class Body(BaseModel):
    """Base class of request bodies: immutable, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OpenAIHyperparameters(Body):
    """Hyperparameters in the format of OpenAI.

    Only `n_epochs` has an effect. For the other two, use `method.distillation.hyperparameters`.
    """

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Auto = "auto"
    batch_size: Auto = "auto"
    learning_rate_multiplier: Auto = "auto"


class Method(Body):
    """Method of the job, which is always a distillation."""

    type: Literal["distillation"]
    distillation: Distillation


class CreateJob(Body):
    """Body of a request that creates a distillation job."""

    model: ModelId
    training_file: FileId
    validation_file: FileId | None = None
    method: Method
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    hyperparameters: OpenAIHyperparameters | None = None
    integrations: Annotated[list[Json], Field(max_length=0)] | None = None


class JobHyperparameters(BaseModel):
    """Hyperparameters of a job in the format of OpenAI."""

    n_epochs: int
    batch_size: str = "auto"
    learning_rate_multiplier: str = "auto"


class QueuePlace(BaseModel):
    """Position of a job in the queue, where 1 is next, and the number of waiting jobs."""

    position: int
    depth: int


class MethodObject(BaseModel):
    """Method of a job with all its options."""

    type: Literal["distillation"] = "distillation"
    distillation: Distillation


class JobObject(BaseModel):
    """Distillation job: OpenAI's fine-tuning job with stages, progress, attempts and the result."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    status: str
    model: str
    teacher: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    integrations: list[Json] | None = None
    hyperparameters: JobHyperparameters
    method: MethodObject
    metadata: dict[str, str]
    seed: int
    trained_tokens: int | None
    error: JobFailure | None
    stage: str | None
    stages: list[Json]
    progress: Json
    queue: QueuePlace | None
    attempt: int
    heartbeat_at: int | None
    cancel_requested_at: int | None
    pause_requested_at: int | None
    pause_reason: str | None
    latest_metrics: Json
    result: Json | None
    usage: Json

    @classmethod
    def of(cls, row: Job, queue: tuple[int, int] | None = None) -> "JobObject":
        spec = DistillationJob.model_validate(row.spec)
        return cls(
            id=row.id,
            created_at=int(row.created_at.timestamp()),
            started_at=seconds(row.started_at),
            finished_at=seconds(row.finished_at),
            estimated_finish=estimated_finish(row),
            status=public_status(row),
            model=row.request["model"],
            teacher=spec.distillation.teacher,
            fine_tuned_model=row.result_model_id,
            organization_id=row.project_id or "",
            training_file=row.training_file_id or "",
            validation_file=row.validation_file_id,
            hyperparameters=JobHyperparameters(n_epochs=spec.distillation.hyperparameters.n_epochs),
            method=MethodObject(distillation=spec.distillation),
            metadata=row.job_metadata,
            seed=spec.seed,
            trained_tokens=row.trained_tokens,
            error=JobFailure.model_validate(row.error) if row.error else None,
            queue=QueuePlace(position=queue[0], depth=queue[1]) if queue else None,
            pause_reason=row.pause_reason,
            result=row.result,
            result_files=row.result_file_ids,
            usage={"trained_tokens": row.trained_tokens},
            **shared_fields(row),
        )


class ImportObject(BaseModel):
    """Job that imports a model."""

    id: str
    object: Literal["model.import"] = "model.import"
    created_at: int
    started_at: int | None
    finished_at: int | None
    status: str
    name: str
    source: str
    model: str | None
    error: JobFailure | None
    stage: str | None
    stages: list[Json]
    progress: Json
    attempt: int
    heartbeat_at: int | None
    cancel_requested_at: int | None
    pause_requested_at: int | None
    latest_metrics: Json

    @classmethod
    def of(cls, row: Job) -> "ImportObject":
        return cls(
            id=row.id,
            created_at=int(row.created_at.timestamp()),
            started_at=seconds(row.started_at),
            finished_at=seconds(row.finished_at),
            status=public_status(row),
            name=row.model_id,
            source=str(row.request.get("source", "staged")),
            model=row.result_model_id,
            error=JobFailure.model_validate(row.error) if row.error else None,
            **shared_fields(row),
        )


class EventObject(BaseModel):
    """Event of a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    type: str
    message: str
    data: Json
    seq: int

    @classmethod
    def of(cls, row: Event) -> "EventObject":
        return cls(
            id=row.id,
            created_at=int(row.created_at.timestamp()),
            level=row.level,
            type=row.type,
            message=row.message,
            data=row.data,
            seq=row.seq,
        )


def openai_metrics(ours: Json) -> Json:
    """Returns the metrics over all held-out rows under the names that OpenAI uses.

    `full_valid_mean_token_accuracy` is the agreement with the teacher. OpenAI's metric compares
    with the text of the rows instead.
    """
    names = {"full_valid_loss": "valid_loss", "full_valid_mean_token_accuracy": "valid_agreement"}
    return {theirs: ours[name] for theirs, name in names.items() if name in ours}


class CheckpointObject(BaseModel):
    """Checkpoint of a job. It can be served as the model `fine_tuned_model_checkpoint`."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: Json
    step_number: int
    is_best: bool
    bytes: int

    @classmethod
    def of(cls, row: Checkpoint, model_id: str) -> "CheckpointObject":
        return cls(
            id=row.id,
            created_at=int(row.created_at.timestamp()),
            fine_tuned_model_checkpoint=f"{model_id}:ckpt-step-{row.step}",
            fine_tuning_job_id=row.job_id,
            metrics={"step": row.step, **openai_metrics(row.metrics), **row.metrics},
            step_number=row.step,
            is_best=row.is_best,
            bytes=row.bytes,
        )


class Point(BaseModel):
    """Value of a metric at one step."""

    step: int
    value: float


class Series(BaseModel):
    """All values of one metric."""

    name: str
    points: list[Point]


class MetricsObject(BaseModel):
    """Metrics of a job."""

    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    data: list[Series]


def shared_fields(row: Job) -> Json:
    """Returns the fields that `JobObject` and `ImportObject` have in common."""
    return {
        "stage": row.stage,
        "stages": row.stages,
        "progress": row.progress,
        "attempt": row.attempt,
        "heartbeat_at": seconds(row.last_heartbeat_at),
        "cancel_requested_at": seconds(row.cancel_requested_at),
        "pause_requested_at": seconds(row.pause_requested_at),
        "latest_metrics": row.latest_metrics,
    }


def seconds(at: datetime | None) -> int | None:
    """Returns a time in seconds since the epoch."""
    return int(at.timestamp()) if at else None


def public_status(row: Job) -> str:
    """Returns the status for clients: one of OpenAI's, or `paused`.

    A job that waits for a retry has the status `queued`.
    """
    return JobStatus.queued.value if row.status == JobStatus.retry_wait else row.status


def estimated_finish(row: Job) -> int | None:
    """Returns the expected end of a running job in seconds since the epoch; None if unknown."""
    remaining = row.progress.get("seconds_remaining")
    if row.status != JobStatus.running or remaining is None:
        return None
    return int(time.time() + float(remaining))
