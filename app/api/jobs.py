"""Routes of /v1/fine_tuning/jobs: submit, observe and control training jobs."""

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.api.deps import AskedPage, Page, Principal, known_query, require
from app.api.metadata_query import METADATA_QUERY, metadata_pairs
from app.api.openapi import EVENTS
from app.api.sse import start_after, stream_events
from app.api.strict_route import StrictRoute
from app.db import jobs as job_rows
from app.db.session import transaction
from app.errors import BadRequest
from app.schemas.estimates import JobEstimate
from app.schemas.files import Deleted
from app.schemas.jobs import (
    CheckpointObject,
    CreateJob,
    EventObject,
    JobObject,
    MetricsObject,
    Point,
    Series,
)
from app.schemas.listing import Listing, ends
from app.services import jobs
from app.services.estimates import estimate
from app.services.retries import MAX_TIMEOUT_SECONDS, RetryInfo

router = APIRouter(route_class=StrictRoute, prefix="/v1/fine_tuning/jobs", tags=["jobs"])
Reader = Annotated[Principal, Depends(require("jobs:read"))]
Writer = Annotated[Principal, Depends(require("jobs:write"))]

KNOWN_QUERY = Depends(known_query())
EVENT_STREAM = "text/event-stream"


def attempted(
    idempotency_key: Annotated[str | None, Header()] = None,
    x_stainless_retry_count: Annotated[int, Header(ge=0)] = 0,
    x_stainless_read_timeout: Annotated[float | None, Header(gt=0)] = None,
    x_stainless_timeout: Annotated[float | None, Header(ge=0)] = None,
) -> RetryInfo:
    """Reads the headers that identify retries of a request.

    Python clients send their read timeout. Other clients send their timeout in whole seconds.
    """
    timeouts = (x_stainless_read_timeout, x_stainless_timeout)
    named = [seconds for seconds in timeouts if seconds is not None]
    return RetryInfo(
        idempotency_key, x_stainless_retry_count, max(named, default=MAX_TIMEOUT_SECONDS)
    )


Repetition = Annotated[RetryInfo, Depends(attempted)]


def is_stream_wanted(request: Request, stream: bool = False) -> bool:
    """Returns whether the client requests server-sent events, by query parameter or header."""
    return stream or EVENT_STREAM in request.headers.get("accept", "")


Streamed = Annotated[bool, Depends(is_stream_wanted)]


@router.post("")
def create_job(
    asked: CreateJob, principal: Writer, repetition: Repetition, response: Response
) -> JobObject:
    """Creates a fine-tuning or distillation job.

    With an `Idempotency-Key` header, a retry returns the job of the first attempt.
    """
    accepted = jobs.create_job(principal, asked, repetition)
    if accepted.is_replay:
        response.headers["idempotent-replayed"] = "true"
    return JobObject.model_validate(accepted.body)


@router.post("/estimate")
def estimate_job(asked: CreateJob, principal: Writer) -> JobEstimate:
    """Estimates the tokens, steps, memory, disk and time of a job, from the body that creates it.

    The body is validated as for a new job, and nothing is stored.
    """
    return estimate.estimate_job(principal, asked)


def metadata_filter(request: Request) -> dict[str, str] | None:
    """Returns the metadata that selects jobs, or None if the client requests no selection.

    It is empty for `metadata=null`, which selects the jobs without metadata.
    """
    values = dict(request.query_params)
    pairs = metadata_pairs(values)
    if "metadata" not in values:
        return pairs or None
    if values["metadata"] != "null" or pairs:
        raise BadRequest(
            "give metadata[key]=value, or metadata=null for jobs without metadata", param="metadata"
        )
    return {}


@router.get("", dependencies=[Depends(known_query({"metadata": "metadata", **METADATA_QUERY}))])
def list_jobs(
    principal: Reader,
    page: AskedPage,
    metadata: Annotated[dict[str, str] | None, Depends(metadata_filter)],
) -> Listing[JobObject]:
    """Lists the training jobs of the project, newest first by default.

    `metadata[key]=value` in the query selects jobs with this metadata, and `metadata=null` those
    without any.
    """
    with transaction() as session:
        rows, has_more = job_rows.page_jobs(
            session,
            principal.project_id,
            kind="distillation",
            after=page.after,
            limit=page.limit,
            order=page.order,
            metadata=metadata,
        )
        data = [jobs.job_object(session, row) for row in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/{job_id}")
def get_job(job_id: str, principal: Reader) -> JobObject:
    """Returns a job with its status, progress and result."""
    with transaction() as session:
        return jobs.job_object(session, jobs.get_job(session, principal.project_id, job_id))


@router.delete("/{job_id}")
def delete_job(job_id: str, principal: Writer) -> Deleted:
    """Deletes a job that has ended, with its history and its checkpoints.

    The job's model, if there is one, must be deleted first.
    """
    jobs.delete_job(principal.project_id, job_id)
    return Deleted(id=job_id, object="fine_tuning.job")


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, principal: Writer) -> JobObject:
    """Cancels a job: at once if it is waiting, within one heartbeat if it is running."""
    return JobObject.of(jobs.cancel_job(principal.project_id, job_id))


@router.post("/{job_id}/pause")
def pause_job(job_id: str, principal: Writer) -> JobObject:
    """Pauses a job. A running job stops at its next checkpoint."""
    return JobObject.of(jobs.pause_job(principal.project_id, job_id))


@router.post("/{job_id}/resume")
def resume_job(job_id: str, principal: Writer) -> JobObject:
    """Resumes a paused job, or a failed job that has a checkpoint.

    The job continues from its newest checkpoint, and its time limit starts anew.
    """
    return JobObject.of(jobs.resume_job(principal.project_id, job_id))


@router.get(
    "/{job_id}/events",
    response_model=Listing[EventObject],
    responses=EVENTS,
    dependencies=[KNOWN_QUERY],
)
def list_events(
    job_id: str, principal: Reader, page: AskedPage, is_streamed: Streamed
) -> Response | Listing[EventObject]:
    """Lists the events of a job, newest first by default.

    With `?stream=true` or `Accept: text/event-stream`, sends the events as they happen, oldest
    first, until the job has ended.
    """
    with transaction() as session:
        jobs.get_job(session, principal.project_id, job_id)
    return answer_events(job_id, page, is_streamed)


@router.get("/{job_id}/metrics")
def get_metrics(
    job_id: str,
    principal: Reader,
    names: Annotated[str | None, Query(max_length=1000)] = None,
    from_step: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    to_step: Annotated[int | None, Query(ge=0, le=2**53)] = None,
) -> MetricsObject:
    """Returns the metrics of a job as series of points.

    `names` is a comma-separated list of metrics; without it, all metrics are returned.
    """
    wanted = [name.strip() for name in names.split(",")] if names else None
    with transaction() as session:
        jobs.get_job(session, principal.project_id, job_id)
        rows = job_rows.metric_series(
            session, job_id, names=wanted, from_step=from_step, to_step=to_step
        )
    series: dict[str, list[Point]] = {}
    for row in rows:
        series.setdefault(row.name, []).append(Point(step=row.step, value=row.value))
    return MetricsObject(data=[Series(name=name, points=points) for name, points in series.items()])


def checkpoint_page(page: AskedPage, limit: Annotated[int, Query(ge=1, le=100)] = 10) -> Page:
    """Reads the page, with OpenAI's default limit for checkpoints."""
    return replace(page, limit=limit)


@router.get("/{job_id}/checkpoints", dependencies=[KNOWN_QUERY])
def list_checkpoints(
    job_id: str, principal: Reader, page: Annotated[Page, Depends(checkpoint_page)]
) -> Listing[CheckpointObject]:
    """Lists the checkpoints of a job that can be served."""
    with transaction() as session:
        job = jobs.get_job(session, principal.project_id, job_id)
        rows, has_more = job_rows.page_checkpoints(
            session, job_id, after=page.after, limit=page.limit, order=page.order
        )
    data = [CheckpointObject.of(row, job.model_id) for row in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


def answer_events(job_id: str, page: Page, is_streamed: bool) -> Response | Listing[EventObject]:
    """Returns a job's events as a page or as a stream.

    Does not check that the job belongs to the client; the caller does.
    """
    if is_streamed:
        return StreamingResponse(
            stream_events(job_id, start_after(job_id, page.after)),
            media_type=EVENT_STREAM,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
    with transaction() as session:
        rows, has_more = job_rows.page_events(
            session, job_id, after=page.after, limit=page.limit, order=page.order
        )
    data = [EventObject.of(row) for row in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)
