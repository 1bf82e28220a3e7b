"""Request and response bodies of /v1/batches, and the lines of input files."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from app.contracts.distillation import FileId
from app.db.schema.tables import Batch
from app.schemas.jobs import Body, Json, Metadata, seconds

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]


class OutputExpiresAfter(Body):
    """Time after which the output files of a batch are deleted."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class CreateBatch(Body):
    """Body of a request that creates a batch."""

    input_file_id: FileId
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: OutputExpiresAfter | None = None


class BatchRequest(Body):
    """One line of an input file. `url` and `body` must fit the endpoint of the batch."""

    custom_id: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    method: str
    url: str
    body: Json


class BatchError(BaseModel):
    """Error in one line of the input file."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    """Errors in the input file."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Number of requests that were answered or failed. A request that never ran is in neither."""

    total: int
    completed: int
    failed: int


class BatchUsage(BaseModel):
    """Number of tokens of all answers of a batch."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int

    @classmethod
    def of(cls, row: Batch) -> "BatchUsage":
        return cls(
            input_tokens=row.input_tokens,
            input_tokens_details={"cached_tokens": row.cached_tokens},
            output_tokens=row.output_tokens,
            output_tokens_details={"reasoning_tokens": 0},
            total_tokens=row.input_tokens + row.output_tokens,
        )


class BatchObject(BaseModel):
    """Batch in the format of OpenAI."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    model: str | None
    usage: BatchUsage
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, row: Batch) -> "BatchObject":
        return cls(
            id=row.id,
            endpoint=row.endpoint,
            errors=None
            if row.errors is None
            else BatchErrors(data=[BatchError(**e) for e in row.errors]),
            input_file_id=row.input_file_id,
            status=row.status,
            output_file_id=row.output_file_id,
            error_file_id=row.error_file_id,
            created_at=int(row.created_at.timestamp()),
            in_progress_at=seconds(row.in_progress_at),
            expires_at=seconds(row.expires_at),
            finalizing_at=seconds(row.finalizing_at),
            completed_at=seconds(row.completed_at),
            failed_at=seconds(row.failed_at),
            expired_at=seconds(row.expired_at),
            cancelling_at=seconds(row.cancelling_at),
            cancelled_at=seconds(row.cancelled_at),
            request_counts=RequestCounts(
                total=row.num_requests, completed=row.num_completed, failed=row.num_failed
            ),
            model=row.model,
            usage=BatchUsage.of(row),
            metadata=row.batch_metadata or None,
        )
