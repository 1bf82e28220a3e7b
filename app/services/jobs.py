"""Accepts distillation and import jobs, and cancels, pauses, resumes and deletes them.

The state of a running job is written by its train worker, not here.
"""

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from app.auth import HUB_TOKEN_SCOPE, Principal
from app.contracts.messages import DistillationJob, ImportJob, JobStatus
from app.crash_points import crash_point
from app.db import files, idempotency, jobs, models
from app.db.locks import lock_project
from app.db.schema.tables import Job
from app.db.session import Session, transaction
from app.errors import BadRequest, Conflict, InProgress, NotFound, QuotaExceeded, Unprocessable
from app.routing import task_queue
from app.schemas.jobs import CreateJob, ImportObject, JobObject
from app.schemas.models import ImportModel
from app.schemas.traffic import DatasetObject
from app.services import submission
from app.services.estimates import limits
from app.services.fine_tuning.supervised import refuse_unsupported
from app.services.retries import (
    RetryInfo,
    Submitted,
    find_created,
    record_attempt,
    remember_job,
)
from app.settings import get_settings

IDEMPOTENCY_KEY_LENGTH = 255
# A retry without an idempotency key returns an equal batch that is at most this old.
DUPLICATE_SECONDS = 600
JOBS_ROUTE = "POST /v1/fine_tuning/jobs"
IMPORTS_ROUTE = "POST /v1/models/import"
Json = dict[str, Any]  # Any: JSON values of the stored response


@dataclass(frozen=True)
class Accepted:
    """The response to a request. `is_replay` is True if an earlier request created its object."""

    body: Json
    is_replay: bool


def create_job(principal: Principal, asked: CreateJob, attempted: RetryInfo) -> Accepted:
    """Queues a training job, or returns the stored response if the request is a retry.

    Raises a StillhouseError if the request is invalid or exceeds a quota.
    """
    refuse_unsupported(asked)
    sha256 = fingerprint(asked.model_dump(mode="json"))
    replay = find_replay(principal, JOBS_ROUTE, attempted, sha256)
    if replay is not None:
        return replay
    submitted = record_attempt(principal, JOBS_ROUTE, attempted, sha256)
    if submitted.job is not None:
        return replayed(submitted.job)
    job_id = f"ftjob-{secrets.token_hex(12)}"
    with transaction() as session:
        demand_room(session, principal.project_id)
        plan = submission.plan(session, principal.project_id, asked, job_id=job_id)
    limits.inspect(plan, get_settings())

    def insert(session: Session) -> Job:
        """Resolves the inputs again, since one may have been deleted, and inserts the job."""
        plan = submission.plan(session, principal.project_id, asked, job_id=job_id)
        return jobs.insert_job(
            session,
            id=job_id,
            project_id=principal.project_id,
            kind="distillation",
            spec=plan.spec.model_dump(mode="json"),
            request=asked.model_dump(mode="json"),
            job_metadata=asked.metadata or {},
            model_id=plan.spec.output_model,
            training_file_id=asked.training_file,
            validation_file_id=asked.validation_file,
            test_file_id=plan.spec.distillation.evaluation.test_file,
            request_sha256=sha256,
            created_by_key_id=principal.key_id,
        )

    return insert_once(principal, JOBS_ROUTE, attempted, submitted, sha256=sha256, insert=insert)


def create_import(principal: Principal, asked: ImportModel, attempted: RetryInfo) -> Accepted:
    """Queues the import of a model from the hub, or returns the stored response of a retry.

    The import uses the hub token only if the API key has the scope for it.

    Raises:
        BadRequest: The source or the idempotency key is malformed.
        Conflict: The name is taken.
        QuotaExceeded: The project has too many jobs that have not ended.
        Unprocessable: The idempotency key was used with another body.
        InProgress: The first request with this key is still being processed.
    """
    if ".." in asked.source:
        raise BadRequest("source must have the form hf:org/name@revision", param="source")
    sha256 = fingerprint(asked.model_dump(mode="json"))
    replay = find_replay(principal, IMPORTS_ROUTE, attempted, sha256)
    if replay is not None:
        return replay
    submitted = record_attempt(principal, IMPORTS_ROUTE, attempted, sha256)
    if submitted.job is not None:
        return replayed(submitted.job)
    hub = asked.source.removeprefix("hf:")
    spec = ImportJob(
        output_model=asked.name,
        hub=hub if "@" in hub else f"{hub}@main",
        uses_hub_token=principal.has(HUB_TOKEN_SCOPE),
        format="hub",
    )

    def insert(session: Session) -> Job:
        """Inserts the job, unless the name is taken."""
        demand_free_name(session, asked.name)
        return jobs.insert_job(
            session,
            id=f"import-{secrets.token_hex(12)}",
            project_id=principal.project_id,
            kind="import",
            spec=spec.model_dump(mode="json"),
            request=asked.model_dump(mode="json"),
            model_id=asked.name,
            request_sha256=sha256,
            created_by_key_id=principal.key_id,
        )

    return insert_once(principal, IMPORTS_ROUTE, attempted, submitted, sha256=sha256, insert=insert)


def insert_once(
    principal: Principal,
    route: str,
    attempted: RetryInfo,
    submitted: Submitted,
    *,
    sha256: str,
    insert: Callable[[Session], Job],
) -> Accepted:
    """Inserts a job and its stored response in one transaction, and notifies the workers.

    If another attempt of the same request has inserted its job, returns that response.

    Raises:
        QuotaExceeded: The project has too many jobs that have not ended.
        Unprocessable: The idempotency key was used with another body.
        InProgress: The first request with this key is still being processed.
    """
    with transaction() as session:
        stored = claim(session, principal, route, attempted, sha256)
        if stored is not None:
            return Accepted(stored, is_replay=True)
        lock_project(session, principal.project_id)
        if (created := find_created(session, submitted)) is not None:
            return Accepted(body_of(session, created), is_replay=True)
        demand_room(session, principal.project_id)
        job = insert(session)
        body = body_of(session, job)
        remember(session, principal, route, attempted, body)
        remember_job(session, submitted, job)
        crash_point("submit.inserted")
    crash_point("submit.committed")
    task_queue.notify_workers()
    crash_point("submit.notified")
    return Accepted(body, is_replay=False)


def demand_free_name(session: Session, name: str) -> None:
    """Raises Conflict if a model or an unfinished job has this name."""
    if models.is_name_taken(session, name):
        message = f"the name {name!r} is taken; choose another"
        raise Conflict(message, "resource_in_use", "name")


def fingerprint(body: Json) -> str:
    """Returns the SHA-256 of a request body, by which equal requests are recognised."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def find_replay(
    principal: Principal, route: str, attempted: RetryInfo, sha256: str
) -> Accepted | None:
    """Returns the response to the first request with this idempotency key, or None.

    Raises:
        BadRequest: The key is malformed.
        Unprocessable: The key was used with another body.
        InProgress: The first request is still being processed.
    """
    key = attempted.idempotency_key
    if key is None:
        return None
    if not (0 < len(key) <= IDEMPOTENCY_KEY_LENGTH and key.isascii() and key.isprintable()):
        raise BadRequest(
            "Idempotency-Key must have 1 to 255 printable ASCII characters", param="Idempotency-Key"
        )
    with transaction() as session:
        found = idempotency.find_key(session, principal.project_id, route, key)
    return Accepted(response_of(found, sha256), is_replay=True) if found else None


def replayed(job: Job) -> Accepted:
    """Returns the response for a job that an earlier attempt of the request created."""
    with transaction() as session:
        return Accepted(body_of(session, job), is_replay=True)


def body_of(session: Session, job: Job) -> Json:
    """Returns the response body that describes a job."""
    answer: ImportObject | DatasetObject | JobObject
    if job.kind == "dataset":
        answer = DatasetObject.of(job)
    else:
        answer = ImportObject.of(job) if job.kind == "import" else job_object(session, job)
    return answer.model_dump(mode="json")


def claim(
    session: Session, principal: Principal, route: str, attempted: RetryInfo, sha256: str
) -> Json | None:
    """Claims the idempotency key for this transaction, or returns the response stored under it.

    Waits for another transaction that has claimed the key. Raises Unprocessable or InProgress.
    """
    if attempted.idempotency_key is None:
        return None
    found = idempotency.claim_key(
        session, principal.project_id, route, attempted.idempotency_key, sha256
    )
    return response_of(found, sha256) if found else None


def response_of(found: idempotency.Claimed, sha256: str) -> Json:
    """Returns the response stored under an idempotency key. Raises Unprocessable or InProgress."""
    if found.request_sha256 != sha256:
        raise Unprocessable(
            "this Idempotency-Key was used with another body; use a new key",
            param="Idempotency-Key",
        )
    if found.response is None:
        raise InProgress("a request with this Idempotency-Key is still being answered")
    return found.response


def remember(
    session: Session, principal: Principal, route: str, attempted: RetryInfo, body: Json
) -> None:
    """Stores the response under the idempotency key, if the request has one."""
    if attempted.idempotency_key is not None:
        idempotency.store_response(
            session, principal.project_id, route, attempted.idempotency_key, body
        )


def demand_room(session: Session, project_id: str) -> None:
    """Locks the project, and raises QuotaExceeded if it has too many jobs that have not ended."""
    lock_project(session, project_id)
    most = get_settings().max_active_jobs_per_project
    if jobs.count_active(session, project_id) >= most:
        raise QuotaExceeded(
            f"the project has {most} jobs that have not ended; wait until one has ended, or cancel one"
        )


def get_job(session: Session, project_id: str, job_id: str, kind: str = "distillation") -> Job:
    """Returns the project's job with this id and kind. Raises NotFound."""
    row = jobs.find_job(session, project_id, job_id)
    if row is None or row.kind != kind:
        raise NotFound(f"the job {job_id!r} does not exist", param="job_id")
    return row


def job_object(session: Session, job: Job) -> JobObject:
    """Returns the API object of a distillation job, with its position in the queue."""
    return JobObject.of(job, jobs.queue_position(session, job))


def cancel_job(project_id: str, job_id: str, kind: str = "distillation") -> Job:
    """Cancels a job that is not running, or requests that a running one stop.

    The worker of a running job learns of the request with its next heartbeat. Raises NotFound, and
    Conflict if the job has ended in another state.
    """
    with transaction() as session:
        job = get_job(session, project_id, job_id, kind)
        after = jobs.request_cancel(session, job.id)
        if after is None:
            hint = (
                "; to free its checkpoints, delete the job"
                if job.status == JobStatus.failed
                else ""
            )
            raise Conflict(f"the job has already {job.status}; it can no longer be cancelled{hint}")
        return after


def pause_job(project_id: str, job_id: str) -> Job:
    """Pauses a waiting job, or requests that a running one stop at its next checkpoint.

    Raises NotFound, and Conflict if the job has ended or is being cancelled.
    """
    with transaction() as session:
        job = get_job(session, project_id, job_id)
        after = jobs.request_pause(session, job.id)
        if after is None:
            raise Conflict(f"the job is {job.status}; only a queued or running job can be paused")
        return after


def resume_job(project_id: str, job_id: str) -> Job:
    """Queues a paused or failed job again. It continues from its newest checkpoint.

    A pause request that has not taken effect yet is withdrawn.

    Raises:
        NotFound: The project has no such job.
        Conflict: There is nothing to resume, or an input of the job was deleted.
        QuotaExceeded: The project has too many jobs that have not ended.
    """
    with transaction() as session:
        get_job(session, project_id, job_id)
        lock_project(session, project_id)
        job = jobs.lock_job(session, job_id)  # its state may have changed since it was read
        if job is None:
            raise NotFound(f"the job {job_id!r} does not exist", param="job_id")
        has_failed = job.status == JobStatus.failed
        if has_failed:
            demand_room(session, project_id)
        after = jobs.resume(session, job.id)
        if after is None:
            raise Conflict(_why_not_resumed(job))
        if has_failed:
            _demand_inputs(session, after)
    task_queue.notify_workers()
    return after


def delete_job(project_id: str, job_id: str) -> None:
    """Deletes a job that has ended. The garbage collector deletes its checkpoints later.

    Raises NotFound, and Conflict if the job has not ended or its model still exists.
    """
    with transaction() as session:
        job = get_job(session, project_id, job_id)
        if jobs.delete_job(session, job.id) is None:
            raise Conflict(f"the job is {job.status}; cancel it first, then delete it")
        # Check after `delete_job` has locked the job: before, it could still register a model.
        model_id = models.model_of_job(session, job.id)
        if model_id is not None:
            message = f"the job's model {model_id!r} exists; delete it first with DELETE /v1/models/{model_id}"
            raise Conflict(message, "resource_in_use", "job_id")


def _why_not_resumed(job: Job) -> str:
    if job.status == JobStatus.failed:
        return "the job failed before its first checkpoint, so there is nothing to resume; submit it again"
    return f"the job is {job.status}; only a paused or failed job can be resumed"


def _demand_inputs(session: Session, job: Job) -> None:
    """Locks the inputs of a job that was queued in this transaction.

    The files and models of a failed job can be deleted; those of a queued job cannot.
    Raises Conflict if an input was deleted, or if the specification of the job cannot be read.
    """
    for param, file_id in (
        ("training_file", job.training_file_id),
        ("validation_file", job.validation_file_id),
        (submission.TEST_FILE, job.test_file_id),
    ):
        if (
            file_id is not None
            and files.find_file(session, job.project_id or "", file_id, lock=True) is None
        ):
            message = f"the {param} {file_id!r} has been deleted, so the job cannot be resumed; submit a new job"
            raise Conflict(message, "input_missing", param)
    try:
        spec = DistillationJob.model_validate(job.spec)
    except ValidationError:
        message = "this version cannot read the job's specification; submit a new job"
        raise Conflict(message, "invalid_spec") from None
    models_of_job = [("model", spec.start)]
    if spec.method == "distillation":
        models_of_job.insert(0, ("teacher", spec.teacher))
    for param, ref in models_of_job:
        if not models.lock_artifact(session, ref.key):
            message = f"the {param} of the job has been deleted, so it cannot be resumed; submit a new job"
            raise Conflict(message, "input_missing", param)
