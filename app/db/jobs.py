"""Operations of the API on jobs: insert, read, cancel, pause, resume and delete.

Writes of running attempts are in `app.db.leases`, and those of the reconciler in
`app.db.reconciliation`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from app.contracts.messages import TERMINAL, JobStatus
from app.db.conditions import HAS_NOT_ENDED, IS_IN_QUEUE
from app.db.job_states import add_event, lock_job, move
from app.db.leases import newest_checkpoint
from app.db.pagination import Order, UnknownCursor, keyset_page
from app.db.schema.tables import Checkpoint, Event, Job, JobCount, Metric
from app.db.trackers.runs import add_runs, reopen_runs
from app.tracing.spans import current_traceparent

__all__ = ["UnknownCursor", "add_event", "lock_job"]  # re-exported for users of this module

MAX_POINTS = 100_000  # over all series, per response


def insert_job(session: Session, **columns: Any) -> Job:  # Any: the columns of Job, by name
    """Inserts a queued job, the first events of its history, and the runs of its trackers.

    If tracing is on, `request` also gets the context of the current span, for the train worker.
    """
    if (traceparent := current_traceparent()) is not None:
        columns["request"] = {**columns.get("request", {}), "traceparent": traceparent}
    job = Job(**columns)
    session.add(job)
    session.flush()
    session.refresh(job)
    add_runs(session, job)
    message = "The job is queued."
    if job.kind == "distillation":
        message = "Files validated, moving job to queued state"
        for text in _first_messages(job):
            add_event(session, job.id, text)
    add_event(session, job.id, message, type="state", data={"status": "queued"})
    return job


def _first_messages(job: Job) -> list[str]:
    """Returns the messages with which OpenAI's history of a job begins."""
    files = f"training file: {job.training_file_id}"
    if job.validation_file_id is not None:
        files += f" and validation file: {job.validation_file_id}"
    return [f"Created fine-tuning job: {job.id}", f"Validating {files}"]


def find_job(session: Session, project_id: str, job_id: str) -> Job | None:
    """Returns the project's job with this id, or None if it does not exist or was deleted."""
    query = select(Job).where(
        Job.id == job_id, Job.project_id == project_id, Job.deleted_at.is_(None)
    )
    return session.scalars(query).one_or_none()


def load_job(session: Session, job_id: str) -> Job | None:
    """Returns the job of any project, even if it was deleted by its owner."""
    return session.get(Job, job_id)


def status_of(session: Session, job_id: str) -> str | None:
    """Returns the status of the job, or None if it does not exist."""
    return session.scalar(select(Job.status).where(Job.id == job_id))


def page_jobs(
    session: Session,
    project_id: str,
    *,
    kind: str | None = None,
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[Job], bool]:
    """Returns a page of the project's jobs, and whether more follow. Raises UnknownCursor.

    metadata: Selects the jobs that have all these keys and values. If empty, selects the jobs that
        have no metadata.
    """
    query = select(Job).where(Job.project_id == project_id, Job.deleted_at.is_(None))
    if kind is not None:
        query = query.where(Job.kind == kind)
    if metadata is not None:
        column = Job.job_metadata
        query = query.where(column.contains(dict(metadata)) if metadata else column == {})
    return keyset_page(session, query, Job, after=after, limit=limit, order=order)


def count_active(session: Session, project_id: str) -> int:
    """Returns the number of the project's jobs that have not ended."""
    query = select(func.count()).select_from(Job).where(Job.project_id == project_id, HAS_NOT_ENDED)
    return session.scalar(query) or 0


def count_by_status(session: Session) -> dict[str, int]:
    """Returns the number of jobs in each state over all projects, including zeros."""
    counts = {status.value: 0 for status in JobStatus}
    sums = select(JobCount.status, func.sum(JobCount.delta)).group_by(JobCount.status)
    for status, count in session.execute(sums):
        counts[status] = int(count)
    return counts


def fold_counts(session: Session) -> None:
    """Replaces the changes that the triggers have recorded with one row per state."""
    removed = delete(JobCount).returning(JobCount.status, JobCount.delta).cte("removed")
    total = func.sum(removed.c.delta)
    sums = select(removed.c.status, total).group_by(removed.c.status).having(total != 0)
    session.execute(insert(JobCount).from_select([JobCount.status, JobCount.delta], sums))


def queue_position(session: Session, job: Job) -> tuple[int, int] | None:
    """Returns the job's position in the queue and the length of the queue.

    Position 1 is the next to run. Returns None if the job is not waiting.
    """
    if job.status not in {JobStatus.queued, JobStatus.retry_wait}:
        return None
    waiting = select(func.count()).select_from(Job).where(IS_IN_QUEUE)
    before = waiting.where(
        (Job.run_after < job.run_after) | ((Job.run_after == job.run_after) & (Job.id < job.id))
    )
    return (session.scalar(before) or 0) + 1, session.scalar(waiting) or 0


def request_cancel(session: Session, job_id: str) -> Job | None:
    """Cancels a waiting job immediately, or requests that a running one stops.

    Returns None if the job does not exist, has succeeded or has failed. Repeating the call changes
    nothing.
    """
    job = lock_job(session, job_id)
    if job is None or job.status in {JobStatus.succeeded, JobStatus.failed}:
        return None
    if job.status == JobStatus.cancelled or job.cancel_requested_at is not None:
        return job
    if job.status != JobStatus.running:
        return move(
            session,
            job_id,
            JobStatus.cancelled,
            message="The job is cancelled.",
            cancel_requested_at=func.now(),
        )
    add_event(session, job_id, "Cancelling: the worker stops the run.")
    return _set(session, job_id, cancel_requested_at=func.now())


def request_pause(session: Session, job_id: str, *, reason: str | None = None) -> Job | None:
    """Pauses a waiting job immediately, or requests that a running one stops at a checkpoint.

    Returns None if the job does not exist, has ended or is being cancelled.

    reason: Reason for a pause by the service; None if the job's owner requests it.
    """
    job = lock_job(session, job_id)
    if job is None or job.status in TERMINAL or job.cancel_requested_at is not None:
        return None
    if job.status == JobStatus.paused or job.pause_requested_at is not None:
        return job
    if job.status != JobStatus.running:
        return move(
            session, job_id, JobStatus.paused, message="The job is paused.", pause_reason=reason
        )
    message = "Pausing: the worker stops the run at a checkpoint." + (
        f" Reason: {reason}" if reason else ""
    )
    add_event(session, job_id, message)
    return _set(session, job_id, pause_requested_at=func.now(), pause_reason=reason)


def resume(session: Session, job_id: str) -> Job | None:
    """Queues a paused job, or a failed one that has a checkpoint.

    For a running job, withdraws a pending pause request. The counts of lost attempts and of runtime
    restart. Returns None if there is nothing to resume.
    """
    job = lock_job(session, job_id)
    if job is None or job.deleted_at is not None:
        return None
    if job.status == JobStatus.running and job.pause_requested_at is not None:
        add_event(session, job_id, "The pause request was withdrawn.")
        return _set(
            session,
            job_id,
            pause_requested_at=None,
            pause_reason=None,
            num_losses=0,
            resumed_at=func.now(),
        )
    checkpoint = newest_checkpoint(session, job_id)
    if job.status == JobStatus.failed and checkpoint is None:
        return None
    if job.status == JobStatus.failed:
        reopen_runs(session, job_id)
    start = f" It continues from the checkpoint at step {checkpoint.step}." if checkpoint else ""
    return move(
        session,
        job_id,
        JobStatus.queued,
        sources={JobStatus.paused, JobStatus.failed},
        message=f"The job is queued again.{start}",
        num_losses=0,
        resumed_at=func.now(),
        cancel_requested_at=None,
        pause_requested_at=None,
        run_after=func.now(),
        last_notified_at=None,
    )


def delete_job(session: Session, job_id: str) -> Job | None:
    """Hides a job that has ended. The garbage collector deletes its checkpoints and its row.

    Returns None if the job does not exist or has not ended.
    """
    job = lock_job(session, job_id)
    if job is None or job.status not in TERMINAL:
        return None
    checkpoints = update(Checkpoint).where(Checkpoint.job_id == job_id)
    session.execute(checkpoints.values(status="deleting"))
    return _set(session, job_id, deleted_at=func.now())


def seq_of_event(session: Session, job_id: str, event_id: str) -> int | None:
    """Returns the sequence number of an event of the job, or None."""
    return session.scalar(select(Event.seq).where(Event.id == event_id, Event.job_id == job_id))


def page_events(
    session: Session,
    job_id: str,
    *,
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
) -> tuple[list[Event], bool]:
    """Returns a page of the job's events, and whether more follow. Raises UnknownCursor."""
    query = select(Event).where(Event.job_id == job_id)
    if after is not None:
        seq = seq_of_event(session, job_id, after)
        if seq is None:
            raise UnknownCursor(after)
        query = query.where(Event.seq > seq if order == "asc" else Event.seq < seq)
    query = query.order_by(Event.seq if order == "asc" else Event.seq.desc())
    found = list(session.scalars(query.limit(limit + 1)))
    return found[:limit], len(found) > limit


def events_since(session: Session, job_id: str, seq: int, *, limit: int = 200) -> list[Event]:
    """Returns the events after `seq`, oldest first; 0 starts with the first event.

    No event is ever inserted before one that has been returned (see `add_event`).
    """
    query = select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq)
    return list(session.scalars(query.limit(limit)))


def metric_series(
    session: Session,
    job_id: str,
    *,
    names: Collection[str] | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    most: int = MAX_POINTS,
) -> list[Metric]:
    """Returns up to `most` values, ordered by name and step.

    The range includes both `from_step` and `to_step`.
    """
    query = select(Metric).where(Metric.job_id == job_id)
    if names is not None:
        query = query.where(Metric.name.in_(names))
    if from_step is not None:
        query = query.where(Metric.step >= from_step)
    if to_step is not None:
        query = query.where(Metric.step <= to_step)
    return list(session.scalars(query.order_by(Metric.name, Metric.step).limit(most)))


def page_checkpoints(
    session: Session,
    job_id: str,
    *,
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
) -> tuple[list[Checkpoint], bool]:
    """Returns a page of the job's committed checkpoints, and whether more follow.

    Raises UnknownCursor.
    """
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.status == "committed")
    return keyset_page(session, query, Checkpoint, after=after, limit=limit, order=order)


def _set(session: Session, job_id: str, **columns: Any) -> Job:  # Any: the columns of Job, by name
    change = update(Job).where(Job.id == job_id).values(**columns).returning(Job)
    return session.scalars(change, execution_options={"populate_existing": True}).one()
