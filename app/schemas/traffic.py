"""Request and response bodies of stored completions and of data sets."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from app.contracts.datasets import (
    MASK_KINDS,
    DatasetOptions,
    FinishReason,
    Fraction,
    MaskKind,
    RecordFilter,
)
from app.contracts.messages import JobFailure
from app.db.schema.tables import Job
from app.schemas.generated import ChatChoice, Usage
from app.schemas.jobs import (
    Body,
    Json,
    Metadata,
    ModelId,
    shared_fields,
)

Seconds = Annotated[int, Field(ge=0, le=2**33)]


def _distinct(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise ValueError("must not contain a value twice")
    return values


class UpdateCompletion(Body):
    """Body of a request that replaces the metadata of a stored completion. Null removes it."""

    metadata: Metadata | None


class StoredCompletionObject(BaseModel):
    """A stored `chat.completion`, with its metadata and some parameters of its request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metadata: dict[str, str]
    request_id: str
    latency_seconds: float
    input_user: str | None = None
    service_tier: str | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    response_format: Json | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class StoredMessage(BaseModel):
    """A message of a stored request. `content_parts` is null unless the client sent parts."""

    id: str
    role: str
    content: str | None
    name: str | None
    refusal: str | None
    content_parts: list[Json] | None


class DeletedCompletion(BaseModel):
    """Response to the deletion of a stored completion."""

    id: str
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    deleted: Literal[True] = True


class DatasetFilter(Body):
    """Filter of stored completions. Times are in seconds since the epoch.

    `created_after` includes its second, and `created_before` does not.
    """

    model: ModelId | None = None
    metadata: Metadata = {}
    created_after: Seconds | None = None
    created_before: Seconds | None = None

    @field_validator("created_before")
    @classmethod
    def _is_after_its_begin(cls, value: int | None, info: ValidationInfo) -> int | None:
        begin = info.data.get("created_after")
        if value is not None and begin is not None and value <= begin:
            raise ValueError("must be greater than created_after")
        return value


DatasetName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]


class CreateDataset(Body):
    """Body of a request that makes a data set from stored completions.

    See `app.contracts.datasets.DatasetOptions` for the options.
    """

    name: DatasetName = "dataset"
    filter: DatasetFilter = DatasetFilter()
    limit: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    finish_reasons: Annotated[
        list[FinishReason], Field(min_length=1, max_length=3), AfterValidator(_distinct)
    ] = ["stop", "tool_calls"]
    min_answer_characters: Annotated[int, Field(ge=1, le=100_000)] = 1
    mask: (
        Literal["all"]
        | Annotated[list[MaskKind], Field(max_length=len(MASK_KINDS)), AfterValidator(_distinct)]
    ) = []
    near_duplicates: Annotated[float, Field(ge=0.5, le=1.0)] | None = 0.8
    validation_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.1
    metadata: Metadata | None = None

    def options(self) -> DatasetOptions:
        """Returns the options in the form of the job."""
        names = DatasetOptions.model_fields.keys() - {"mask"}
        given = {name: value for name, value in dict(self).items() if name in names}
        mask = MASK_KINDS if self.mask == "all" else tuple(self.mask)
        return DatasetOptions.model_validate(given | {"mask": mask})

    def records(self, now: float) -> RecordFilter:
        """Returns the filter in the form of the job, which takes no completion from after `now`.

        A job that is tried again then reads the same completions.
        """
        end = self.filter.created_before
        return RecordFilter(
            model=self.filter.model,
            metadata=self.filter.metadata,
            created_after=self.filter.created_after,
            created_before=now if end is None else min(now, end),
        )


class DatasetObject(BaseModel):
    """Data set, or the job that makes it. The ids of files are null until it has succeeded.

    `request` is the body that created it. `report` says how the rows were chosen.
    """

    id: str
    object: Literal["dataset"] = "dataset"
    created_at: int
    started_at: int | None
    finished_at: int | None
    name: str
    status: str
    request: Json
    metadata: dict[str, str]
    training_file: str | None
    validation_file: str | None
    test_file: str | None
    report: Json | None
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
    def of(cls, row: Job) -> "DatasetObject":
        """Returns the API object of a job of kind `dataset`."""
        result = row.result or {}
        files = result.get("files", {})
        return cls(
            name=row.model_id,
            request=row.request,
            metadata=row.job_metadata,
            training_file=files.get("training"),
            validation_file=files.get("validation"),
            test_file=files.get("test"),
            report=result.get("report"),
            error=JobFailure.model_validate(row.error) if row.error else None,
            **shared_fields(row),
        )
