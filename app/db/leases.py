"""Writes to a job by the worker that holds its lease.

Every write is fenced: it takes effect only while the caller's token is the job's lease token.
Unless stated otherwise, a function that returns None has changed nothing because the lease is lost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.contracts.messages import JobFailure, JobStatus
from app.db.files import insert_file
from app.db.job_states import Level, add_event, move
from app.db.models import insert_model
from app.db.schema.json_values import clean, clean_text
from app.db.schema.table import Json
from app.db.schema.tables import Attempt, Checkpoint, Job, Metric, lease_tokens
from app.settings import get_settings

MAX_DOUBLINGS: Final = 10
# Error codes of failures that recur after a resume, because their cause is part of the job.
FAILS_AGAIN: Final = frozenset({"invalid_spec", "input_missing", "model_id_taken", "gate_failed"})


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy for lost attempts.

    max_losses: Number of losses at which the job fails.
    backoff_seconds: Delay after the first loss. It doubles with each further loss.
    """

    max_losses: int
    backoff_seconds: float


def retry_policy() -> RetryPolicy:
    """Returns the retry policy of the settings."""
    settings = get_settings()
    return RetryPolicy(settings.max_losses, settings.retry_backoff_seconds)


def claim(session: Session, owner: str, lease_seconds: float) -> Job | None:
    """Claims the next due job of any kind, with a new lease token. Returns None if none is due.

    `owner` identifies this claim. If the call is repeated with the same `owner`, because its
    response was lost, it returns the job that was already claimed.
    """
    claimed = select(Job).where(Job.status == JobStatus.running, Job.lease_owner == owner)
    job = session.scalars(claimed).one_or_none()
    if job is not None:
        return job
    due = (
        select(Job.id, Job.kind, Job.attempt)
        .where(Job.status == JobStatus.queued, Job.run_after <= func.now())
        .order_by(Job.run_after, Job.id)
        .with_for_update(skip_locked=True, key_share=True)
        .limit(1)
    )
    next_job = session.execute(due).one_or_none()
    if next_job is None:
        return None
    is_first = next_job.kind == "distillation" and next_job.attempt == 0
    token = session.scalar(lease_tokens)
    job = move(
        session,
        next_job.id,
        JobStatus.running,
        message="Fine-tuning job started" if is_first else "A worker has taken the job.",
        attempt=Job.attempt + 1,
        lease_token=token,
        lease_owner=owner,
        lease_expires_at=func.now() + timedelta(seconds=lease_seconds),
        last_heartbeat_at=func.now(),
        started_at=func.coalesce(Job.started_at, func.now()),
    )
    assert job is not None, "the row was locked as queued"
    assert token is not None
    session.add(Attempt(job_id=job.id, attempt=job.attempt, lease_token=token, worker_id=owner))
    session.flush()
    return job


def heartbeat(session: Session, job_id: str, token: int, lease_seconds: float) -> Job | None:
    """Renews the lease and returns the job, whose columns contain cancel and pause requests."""
    return _write(
        session,
        job_id,
        token,
        last_heartbeat_at=func.now(),
        lease_expires_at=func.now() + timedelta(seconds=lease_seconds),
    )


def hold(session: Session, job_id: str, token: int) -> Job | None:
    """Locks the job until the transaction ends and returns it, or None if the lease is lost."""
    query = select(Job).where(
        Job.id == job_id, Job.status == JobStatus.running, Job.lease_token == token
    )
    query = query.with_for_update(key_share=True)
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def begin_record(session: Session, token: int, number: int) -> bool:
    """Stores the number of the record that is written in this transaction.

    Returns False if a record with this number was committed before, so that a repeated write can
    be skipped. Numbers increase within an attempt. Call `hold` before.
    """
    noted = update(Attempt).where(Attempt.lease_token == token, Attempt.num_records < number)
    noted = noted.values(num_records=number).returning(Attempt.num_records)
    return session.scalar(noted) is not None


def write_progress(session: Session, job_id: str, token: int, **columns: Any) -> Job | None:
    """Sets some of the columns `stage`, `stages`, `progress` and `latest_metrics`."""
    return _write(session, job_id, token, **{name: clean(value) for name, value in columns.items()})


def write_metrics(session: Session, job_id: str, step: int, values: Mapping[str, float]) -> None:
    """Writes the metrics of one step, and replaces values that the step already has.

    NaN and infinities are skipped. Call `hold` before.
    """
    rows = [
        {"job_id": job_id, "name": name[:64], "step": step, "value": float(value)}
        for name, value in values.items()
        if math.isfinite(value)
    ]
    if rows:
        fresh = insert(Metric).values(rows)
        keys = [Metric.job_id, Metric.name, Metric.step]
        session.execute(
            fresh.on_conflict_do_update(index_elements=keys, set_={"value": fresh.excluded.value})
        )


def newest_checkpoint(session: Session, job_id: str) -> Checkpoint | None:
    """Returns the checkpoint from which a run resumes: the committed one with the highest step."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.status == "committed")
    query = query.order_by(Checkpoint.step.desc(), Checkpoint.lease_token.desc())
    return session.scalars(query.limit(1)).one_or_none()


def note_resumed_from(session: Session, token: int, step: int | None) -> None:
    """Records the step from which the attempt resumes; None if it starts from the beginning."""
    session.execute(update(Attempt).where(Attempt.lease_token == token).values(resumed_from=step))


def succeed(
    session: Session,
    job_id: str,
    token: int,
    *,
    model: Json,
    result: Json,
    trained_tokens: int,
    files: Sequence[Json] = (),
) -> Job | None:
    """Registers the model and the result files, and ends the job as succeeded.

    Cancels the job instead if that was requested, or fails it if the model id is taken. `model` has
    columns of Model and `files` columns of File. Files of a job without a project are not kept.
    """
    job = hold(session, job_id, token)
    if job is None:
        return None
    if job.cancel_requested_at is not None:
        return move(
            session, job_id, JobStatus.cancelled, token=token, message="The job is cancelled."
        )
    model = {**model, "facts": clean(model["facts"]), "evaluation": clean(result) or None}
    if job.kind == "distillation":
        model["base_id"] = job.request.get("model")
    if insert_model(session, source_job_id=job_id, project_id=job.project_id, **model) is None:
        taken = f"the model id {model['id']!r} has been taken by another model; submit the job again with another name"
        return fail(session, job_id, token, JobFailure(code="model_id_taken", message=taken))
    message = f"The job has succeeded; the new model is {model['id']}."
    if job.kind == "distillation":
        message = "The job has successfully completed"
        created = f"New fine-tuned model created: {model['id']}"
        add_event(session, job_id, created, data={"model": model["id"]})
    for columns in files if job.project_id is not None else ():
        insert_file(session, project_id=job.project_id, **columns)
    return move(
        session,
        job_id,
        JobStatus.succeeded,
        token=token,
        message=message,
        result=clean(result),
        result_model_id=model["id"],
        result_file_ids=[file["id"] for file in files],
        trained_tokens=trained_tokens,
        progress=clean({**job.progress, "percent": 100.0, "seconds_remaining": 0.0}),
    )


def fail(
    session: Session,
    job_id: str,
    token: int | None,
    failure: JobFailure,
    *,
    outcome: str = "failed",
    **columns: Any,
) -> Job | None:  # Any: more columns of Job, by name
    """Ends the job as failed. If `token` is None, the lease is not checked.

    If the job has a checkpoint, a notice that it is kept is added to the failure's message.
    """
    checkpoint = newest_checkpoint(session, job_id)
    if checkpoint is not None:
        notice = _kept_notice(
            job_id, checkpoint.step, can_be_resumed=failure.code not in FAILS_AGAIN
        )
        message = f"{failure.message.rstrip('.')}. {notice}"
        failure = failure.model_copy(update={"message": message})
    return move(
        session,
        job_id,
        JobStatus.failed,
        token=token,
        outcome=outcome,
        level="error",
        message=f"The job has failed: {failure.message}",
        error=clean(failure.model_dump()),
        **columns,
    )


def lose(
    session: Session,
    job_id: str,
    token: int,
    retry_policy: RetryPolicy,
    *,
    reason: str,
    error_code: str,
) -> Job | None:
    """Counts a lost attempt. The job is tried again after a wait, or fails after too many losses.

    Cancels or pauses the job instead if that was requested in the meantime.
    """
    job = hold(session, job_id, token)
    if job is None:
        return None
    num_losses = job.num_losses + 1
    outcome = "out_of_memory" if error_code == "out_of_memory" else "lost"
    if job.cancel_requested_at is not None:
        return move(
            session,
            job_id,
            JobStatus.cancelled,
            token=token,
            message="The job is cancelled.",
            outcome="lost",
        )
    if job.pause_requested_at is not None:
        return pause(session, job_id, token, prefix=f"{reason} ", num_losses=num_losses)
    if num_losses >= retry_policy.max_losses:
        message = (
            f"{reason} This was lost attempt {num_losses} of at most {retry_policy.max_losses}."
        )
        failure = JobFailure(code=error_code, message=message)
        return fail(session, job_id, token, failure, outcome=outcome, num_losses=num_losses)
    delay_seconds = retry_policy.backoff_seconds * 2 ** min(num_losses - 1, MAX_DOUBLINGS)
    return move(
        session,
        job_id,
        JobStatus.retry_wait,
        token=token,
        level="warn",
        outcome=outcome,
        message=f"{reason} The job is tried again in {delay_seconds:.0f} s (lost attempt {num_losses} of {retry_policy.max_losses}).",
        num_losses=num_losses,
        run_after=func.now() + timedelta(seconds=delay_seconds),
    )


def cancel(session: Session, job_id: str, token: int) -> Job | None:
    """Ends the job as cancelled."""
    return move(session, job_id, JobStatus.cancelled, token=token, message="The job is cancelled.")


def pause(
    session: Session, job_id: str, token: int, *, prefix: str = "", **columns: Any
) -> Job | None:  # Any: more columns of Job, by name
    """Pauses the job as requested, or queues it again if the request was withdrawn.

    Cancels it instead if that was requested. The event's message begins with `prefix`.
    """
    job = hold(session, job_id, token)
    if job is None:
        return None
    if job.cancel_requested_at is not None:
        return cancel(session, job_id, token)
    if job.pause_requested_at is None:
        return release(session, job_id, token, reason="The pause request was withdrawn.")
    columns |= {"pause_requested_at": None}
    message = f"{prefix}The job is paused" + (f": {job.pause_reason}" if job.pause_reason else ".")
    level: Level = "warn" if job.pause_reason else "info"
    return move(
        session, job_id, JobStatus.paused, token=token, level=level, message=message, **columns
    )


def pause_for_disk(session: Session, job_id: str, token: int, *, message: str) -> Job | None:
    """Pauses a job that needs more disk space. Its owner can resume it once there is space.

    Cancels it instead if that was requested.
    """
    job = hold(session, job_id, token)
    if job is None:
        return None
    if job.cancel_requested_at is not None:
        return cancel(session, job_id, token)
    return move(
        session,
        job_id,
        JobStatus.paused,
        token=token,
        level="error",
        message=message,
        pause_requested_at=None,
        pause_reason=clean_text(message.removeprefix("The job is paused: ")),
    )


def release(session: Session, job_id: str, token: int, *, reason: str) -> Job | None:
    """Queues the job again without counting a loss. The next worker resumes from its checkpoint.

    Cancels or pauses the job instead if that was requested.
    """
    job = hold(session, job_id, token)
    if job is None:
        return None
    if job.cancel_requested_at is not None:
        return cancel(session, job_id, token)
    if job.pause_requested_at is not None:
        return pause(session, job_id, token)
    return move(
        session,
        job_id,
        JobStatus.queued,
        token=token,
        outcome="released",
        message=f"{reason} The job is queued again.",
        run_after=func.now(),
        last_notified_at=None,
    )


def outcome_of(session: Session, token: int) -> str | None:
    """Returns the outcome of the attempt with this token, or None while it runs.

    It distinguishes a repeated call that ends the attempt from a lost lease.
    """
    return session.scalar(select(Attempt.outcome).where(Attempt.lease_token == token))


def _kept_notice(job_id: str, step: int, *, can_be_resumed: bool) -> str:
    url = f"/v1/fine_tuning/jobs/{job_id}"
    if not can_be_resumed:
        return f"The checkpoint at step {step} is kept until you delete the job with DELETE {url}."
    return (
        f"The checkpoint at step {step} is kept. After you have fixed the cause, resume the job with "
        f"POST {url}/resume, or delete it and its checkpoints with DELETE {url}."
    )


def _write(
    session: Session, job_id: str, token: int, **columns: Any
) -> Job | None:  # Any: columns of Job
    change = update(Job).where(
        Job.id == job_id, Job.status == JobStatus.running, Job.lease_token == token
    )
    change = change.values(**columns).returning(Job)
    return session.scalars(change, execution_options={"populate_existing": True}).one_or_none()
