"""Request and response bodies of /v1/fine_tuning/jobs: OpenAI's objects with additional fields."""

import time
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from app.contracts.distillation import NO_NUL, Auto, Distillation, FileId, Lora
from app.contracts.messages import DistillationJob, JobFailure, JobStatus, MethodName
from app.contracts.trackers import Integration
from app.db.schema.tables import Checkpoint, Event, Job
from app.schemas.openai_metrics import openai_metrics

Json = dict[str, Any]  # Any: metrics, results and event data are open-ended JSON
ModelId = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=NO_NUL)]
# Other characters than a-z, 0-9 and "-" are replaced in the model's name, see `app.services`.
Suffix = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
EXCLUDED_IF_NULL = Field(exclude_if=lambda value: value is None)


class Body(BaseModel):
    """Base class of request bodies: immutable, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OpenAIHyperparameters(Body):
    """Hyperparameters in the format of OpenAI. `batch_size` counts rows."""

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0.0, le=1000.0)] | Auto = "auto"


class Supervised(Body):
    """Options of supervised fine-tuning. With `lora`, adapters are trained instead of all weights.

    `lora` is an extension of OpenAI's format.
    """

    hyperparameters: OpenAIHyperparameters | None = None
    lora: Lora | None = None


class SupervisedMethod(Body):
    """Fine-tuning on the answers in the rows, without a teacher."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class DistillationMethod(Body):
    """Distillation of a teacher."""

    type: Literal["distillation"]
    distillation: Distillation


class OtherMethod(BaseModel):
    """Method of OpenAI that is not supported. It is accepted here to be refused with advice."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["dpo", "reinforcement"]


Method = Annotated[SupervisedMethod | DistillationMethod | OtherMethod, Field(discriminator="type")]


class CreateJob(Body):
    """Body of a request that creates a job. Without `method`, the job is supervised."""

    model: ModelId
    training_file: FileId
    validation_file: FileId | None = None
    method: Method | None = None
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    hyperparameters: OpenAIHyperparameters | None = None
    integrations: list[Integration] | None = None

    @property
    def distillation(self) -> Distillation | None:
        """The options of a distillation, or None for another method."""
        return self.method.distillation if isinstance(self.method, DistillationMethod) else None

    @property
    def supervised(self) -> Supervised:
        """The options of a supervised job."""
        method = self.method
        return (method.supervised if isinstance(method, SupervisedMethod) else None) or Supervised()


class JobHyperparameters(BaseModel):
    """Hyperparameters of a job in the format of OpenAI."""

    n_epochs: int | Auto
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"


class QueuePlace(BaseModel):
    """Position of a job in the queue, where 1 is next, and the number of waiting jobs."""

    position: int
    depth: int


class SupervisedOptions(BaseModel):
    """Options of a supervised job."""

    hyperparameters: JobHyperparameters
    lora: Lora | None = None


class MethodObject(BaseModel):
    """Method of a job with all its options."""

    type: MethodName
    distillation: Annotated[Distillation | None, EXCLUDED_IF_NULL] = None
    supervised: Annotated[SupervisedOptions | None, EXCLUDED_IF_NULL] = None

    @classmethod
    def of(cls, spec: DistillationJob, hyperparameters: JobHyperparameters) -> "MethodObject":
        if spec.method == "distillation":
            return cls(type=spec.method, distillation=spec.distillation)
        options = SupervisedOptions(
            hyperparameters=hyperparameters, lora=spec.distillation.student.lora
        )
        return cls(type=spec.method, supervised=options)


class JobError(BaseModel):
    """Reason of a failure. As in the OpenAI API, all fields are null unless the job has failed."""

    code: str | None = None
    message: str | None = None
    param: str | None = None


class JobObject(BaseModel):
    """OpenAI's fine-tuning job, with stages, progress, attempts and the result."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    status: str
    model: str
    teacher: str | None
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    user_provided_suffix: str | None = None
    integrations: list[Json] | None = None
    hyperparameters: JobHyperparameters
    method: MethodObject
    metadata: dict[str, str]
    seed: int
    trained_tokens: int | None
    error: Annotated[JobError, BeforeValidator(lambda value: value or {})]
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
        hyperparameters = shown_hyperparameters(row, spec)
        return cls(
            estimated_finish=estimated_finish(row),
            model=row.request["model"],
            teacher=None if spec.method == "supervised" else spec.distillation.teacher,
            fine_tuned_model=row.result_model_id,
            organization_id=row.project_id or "",
            training_file=row.training_file_id or "",
            validation_file=row.validation_file_id,
            user_provided_suffix=row.request.get("suffix"),
            integrations=row.request.get("integrations"),
            hyperparameters=hyperparameters,
            method=MethodObject.of(spec, hyperparameters),
            metadata=row.job_metadata,
            seed=spec.seed,
            trained_tokens=row.trained_tokens,
            error=JobError.model_validate(row.error or {}),
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
            data=openai_metrics(row.data) if row.type == "metrics" else row.data,
            seq=row.seq,
        )


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
            metrics={"step": row.step, **openai_metrics(row.metrics)},
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
    """Returns the fields that the API objects of all kinds of jobs have in common."""
    return {
        "id": row.id,
        "created_at": int(row.created_at.timestamp()),
        "started_at": seconds(row.started_at),
        "finished_at": seconds(row.finished_at),
        "status": public_status(row),
        "stage": row.stage,
        "stages": row.stages,
        "progress": row.progress,
        "attempt": row.attempt,
        "heartbeat_at": seconds(row.last_heartbeat_at),
        "cancel_requested_at": seconds(row.cancel_requested_at),
        "pause_requested_at": seconds(row.pause_requested_at),
        "latest_metrics": row.latest_metrics,
    }


def shown_hyperparameters(row: Job, spec: DistillationJob) -> JobHyperparameters:
    """Returns the hyperparameters in the format of OpenAI.

    A number that the service chooses is shown once a supervised job has started, and "auto" until
    then. `batch_size` stays "auto" if batches are formed by tokens.
    """
    chosen = spec.distillation.hyperparameters
    inner = ((row.request.get("method") or {}).get("supervised") or {}).get("hyperparameters")
    requested = [part["n_epochs"] for part in (row.request.get("hyperparameters"), inner) if part]
    is_open = spec.method == "supervised" and set(requested) <= {"auto"} and row.started_at is None
    multiplier = chosen.learning_rate_multiplier
    if multiplier is None and spec.method == "supervised" and row.started_at is not None:
        multiplier = 1.0
    return JobHyperparameters(
        n_epochs="auto" if is_open else chosen.n_epochs,
        batch_size=chosen.batch_rows or "auto",
        learning_rate_multiplier=multiplier or "auto",
    )


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
