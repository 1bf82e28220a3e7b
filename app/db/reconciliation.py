"""Queries of the reconciler: due jobs, expired leases, overdue cancellations and garbage."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVarTuple

from sqlalchemy import ScalarSelect, Select, delete, func, select, text, union_all, update
from sqlalchemy.orm import Session

from app.contracts.messages import TERMINAL, JobFailure, JobStatus
from app.db import jobs, leases
from app.db.conditions import HAS_NOT_ENDED
from app.db.job_states import move
from app.db.schema.retry_tables import IdempotencyKey
from app.db.schema.tables import ENDED_BATCHES, Attempt, Batch, Checkpoint, File, Job, Model

LEADER_LOCK: Final = 7_355_609  # arbitrary, but not used by any other lock
BATCH: Final = 100  # maximum number of rows per rule and pass
NOTIFY_BACKOFF: Final = 10  # longest wait until the next wake-up message, over the shortest wait

Columns = TypeVarTuple("Columns")


@dataclass(frozen=True)
class StoredJob:
    """State of a job that the garbage collector needs to decide what to keep in the store."""

    kind: str
    status: str
    lease_token: int | None
    is_deleted: bool
    kept_keys: frozenset[str]

    @property
    def has_ended(self) -> bool:
        return self.status in TERMINAL

    @property
    def can_run_again(self) -> bool:
        """True if an attempt may write to the store, now or after a resume."""
        can_be_resumed = (
            self.kind == "distillation" and self.status == JobStatus.failed and not self.is_deleted
        )
        return not self.has_ended or can_be_resumed

    @property
    def is_discarded(self) -> bool:
        """True if nothing of the job is kept, except a model that it registered."""
        return self.is_deleted or self.status == JobStatus.cancelled


def try_lead(session: Session) -> bool:
    """Returns whether this transaction is the leader, which alone may reconcile until it ends."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(LEADER_LOCK))))


def server_age_seconds(session: Session) -> float:
    """Returns the time since the database server started, by its own clock."""
    age = session.scalar(
        text("SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())")
    )
    return float(age or 0.0)


def mark_due_notified(session: Session, again_seconds: float, most: int) -> int:
    """Selects up to `most` due jobs that need a wake-up message, and returns their number.

    These are jobs that had no message yet, or whose last message was some time ago. That time
    increases from `again_seconds` to NOTIFY_BACKOFF times as much. The time of the message is
    recorded here, and the caller sends the message.
    """
    # Exponential back-off: wait as long again as the job had waited at its last message.
    waited = Job.last_notified_at - Job.run_after
    pause = func.least(
        func.greatest(waited, timedelta(seconds=again_seconds)),
        timedelta(seconds=NOTIFY_BACKOFF * again_seconds),
    )
    due = (
        select(Job.id)
        .where(Job.status == JobStatus.queued, Job.run_after <= func.now())
        .where(Job.last_notified_at.is_(None) | (Job.last_notified_at < func.now() - pause))
        .order_by(Job.last_notified_at.asc().nulls_first(), Job.run_after)
    )
    notified = update(Job).where(Job.id.in_(_batch(due, most)))
    notified = notified.values(last_notified_at=func.now()).execution_options(
        synchronize_session=False
    )
    return len(session.scalars(notified.returning(Job.id)).all())


def expire_leases(session: Session, retry_policy: leases.RetryPolicy) -> int:
    """Ends attempts whose lease has expired, and returns their number."""
    silent = select(Job).where(Job.status == JobStatus.running, Job.lease_expires_at < func.now())
    reason = "The worker has stopped responding."
    lost = [
        leases.lose(
            session, job.id, job.lease_token, retry_policy, reason=reason, error_code="worker_lost"
        )
        for job in _jobs(session, silent.order_by(Job.lease_expires_at))
        if job.lease_token is not None
    ]
    return len(lost) - lost.count(None)


def finish_cancels(session: Session, grace_seconds: float) -> int:
    """Cancels jobs whose cancellation was requested, and returns their number.

    A running job is left to its worker until `grace_seconds` after the request.
    """
    asked = select(Job).where(
        Job.cancel_requested_at.is_not(None),
        (Job.status.not_in([*TERMINAL, JobStatus.running]))
        | (
            (Job.status == JobStatus.running)
            & (Job.cancel_requested_at < func.now() - timedelta(seconds=grace_seconds))
        ),
    )
    message = "The job is cancelled."
    moved = [
        move(session, job.id, JobStatus.cancelled, message=message) for job in _jobs(session, asked)
    ]
    return len(moved) - moved.count(None)


def wake(session: Session) -> int:
    """Queues the jobs whose delay after a lost attempt is over, and returns their number.

    The reconciler calls this every few seconds, so a delay may last that much longer.
    """
    rested = select(Job).where(Job.status == JobStatus.retry_wait, Job.run_after <= func.now())
    message = "The job is queued again."
    moved = [
        move(
            session,
            job.id,
            JobStatus.queued,
            sources={JobStatus.retry_wait},
            message=message,
            last_notified_at=None,
        )
        for job in _jobs(session, rested)
    ]
    return len(moved) - moved.count(None)


def end_overdue(session: Session, max_runtime_seconds: float, grace_seconds: float) -> int:
    """Stops jobs that have exceeded the runtime limit, and returns their number.

    The runtime of all attempts since the last resume counts. A distillation is requested to pause
    at a checkpoint; after `grace_seconds`, it is paused without its worker. An import has no
    checkpoints, and fails.
    """
    overdue = select(Job).where(
        Job.status == JobStatus.running,
        Job.cancel_requested_at.is_(None),
        Job.pause_requested_at.is_(None)
        | (Job.pause_requested_at < func.now() - timedelta(seconds=grace_seconds)),
        _runtime() > timedelta(seconds=max_runtime_seconds),
    )
    stopped = [_stop(session, job, max_runtime_seconds) for job in _jobs(session, overdue)]
    return len(stopped) - stopped.count(None)


def _runtime() -> ScalarSelect[Any]:  # Any: an interval, whose type SQLAlchemy does not infer
    """Returns a subquery for the total runtime of a job's attempts since its last resume."""
    ended_at = func.coalesce(Attempt.ended_at, func.now())
    started_at = func.greatest(Attempt.started_at, Job.resumed_at)  # ignores nulls
    runtime = select(func.sum(ended_at - started_at)).where(
        Attempt.job_id == Job.id, ended_at > started_at
    )
    return runtime.correlate(Job).scalar_subquery()


def _stop(session: Session, job: Job, max_runtime_seconds: float) -> Job | None:
    limit = f"{max_runtime_seconds:.0f} s, the limit that STILLHOUSE_MAX_RUNTIME_SECONDS sets"
    if job.kind != "distillation":
        message = f"the job has run for more than {limit}; raise the limit and submit the job again"
        failure = JobFailure(code="max_runtime_exceeded", message=message)
        return leases.fail(session, job.id, job.lease_token, failure)
    if job.pause_requested_at is None:
        reason = (
            f"it has run for more than {limit}. Its checkpoints are kept. To continue from the newest "
            f"checkpoint with a new time limit, resume the job with POST /v1/fine_tuning/jobs/{job.id}/resume."
        )
        return jobs.request_pause(session, job.id, reason=reason)
    assert job.lease_token is not None, "the job is running"
    return leases.pause(
        session, job.id, job.lease_token, prefix="The worker has not stopped the run. "
    )


def mark_unneeded_checkpoints(session: Session) -> list[tuple[str, str]]:
    """Returns the id and the store key of up to BATCH checkpoints to delete, oldest first.

    Before, it marks all checkpoints of cancelled and deleted jobs for deletion.
    """
    discarded = select(Job.id).where(
        (Job.status == JobStatus.cancelled) | Job.deleted_at.is_not(None)
    )
    doomed = update(Checkpoint).where(
        Checkpoint.status != "deleting", Checkpoint.job_id.in_(discarded)
    )
    session.execute(doomed.values(status="deleting").execution_options(synchronize_session=False))
    query = select(Checkpoint.id, Checkpoint.store_key).where(Checkpoint.status == "deleting")
    return [
        (row.id, row.store_key)
        for row in session.execute(query.order_by(Checkpoint.created_at).limit(BATCH))
    ]


def forget_checkpoints(session: Session, ids: Collection[str]) -> None:
    """Deletes the rows of checkpoints whose stored data has been deleted."""
    session.execute(
        delete(Checkpoint).where(Checkpoint.id.in_(ids), Checkpoint.status == "deleting")
    )


def deleted_jobs(session: Session, older_than_seconds: float) -> list[str]:
    """Returns ids of jobs that were deleted more than `older_than_seconds` ago.

    Jobs whose checkpoints or model still have rows are left out. At most BATCH ids are returned.
    """
    checkpoints = select(Checkpoint.id).where(Checkpoint.job_id == Job.id).correlate(Job)
    models = select(Model.id).where(Model.source_job_id == Job.id).correlate(Job)
    query = select(Job.id).where(
        Job.deleted_at < func.now() - timedelta(seconds=older_than_seconds)
    )
    query = query.where(~checkpoints.exists(), ~models.exists()).order_by(Job.deleted_at)
    return list(session.scalars(query.limit(BATCH)))


def forget_jobs(session: Session, ids: Collection[str]) -> None:
    """Deletes the rows of deleted jobs, with their attempts, events and metrics."""
    gone = delete(Job).where(Job.id.in_(ids), Job.deleted_at.is_not(None))
    session.execute(gone.execution_options(synchronize_session=False))


def forget_expired_files(session: Session) -> list[str]:
    """Deletes the rows of expired files that no unfinished job or batch reads.

    Returns their store keys. At most BATCH files are deleted per call.
    """
    jobs = select(Job.id).where(
        HAS_NOT_ENDED,
        (Job.training_file_id == File.id)
        | (Job.validation_file_id == File.id)
        | (Job.test_file_id == File.id),
    )
    batches = select(Batch.id).where(
        Batch.status.not_in(ENDED_BATCHES), Batch.input_file_id == File.id
    )
    expired = select(File.id).where(
        File.expires_at <= func.now(),
        ~jobs.correlate(File).exists(),
        ~batches.correlate(File).exists(),
    )
    gone = delete(File).where(File.id.in_(_batch(expired, BATCH)))
    gone = gone.execution_options(synchronize_session=False)
    return list(session.scalars(gone.returning(File.store_key)))


def forget_expired_keys(session: Session) -> int:
    """Deletes expired idempotency keys, and returns their number."""
    gone = delete(IdempotencyKey).where(IdempotencyKey.expires_at <= func.now())
    gone = gone.execution_options(synchronize_session=False)
    return len(session.scalars(gone.returning(IdempotencyKey.key)).all())


def stored_jobs(session: Session, job_ids: Collection[str]) -> dict[str, StoredJob]:
    """Returns the state of each of these jobs, with the store keys that rows refer to.

    One statement reads everything from one snapshot. Between two statements, a job could succeed:
    it would be seen as ended, but without the model that it registered in the same transaction.
    """
    kept_keys = union_all(
        select(Checkpoint.store_key).where(Checkpoint.job_id == Job.id),
        select(Model.store_key).where(Model.source_job_id == Job.id),
    )
    query = select(
        Job.id,
        Job.kind,
        Job.status,
        Job.lease_token,
        Job.deleted_at,
        func.array(kept_keys.scalar_subquery()),
    ).where(Job.id.in_(job_ids))
    return {
        job_id: StoredJob(kind, status, lease_token, deleted_at is not None, frozenset(kept))
        for job_id, kind, status, lease_token, deleted_at, kept in session.execute(query)
    }


def spent_imports(session: Session) -> set[str]:
    """Returns the store keys of staged models whose import jobs have all ended."""
    staged = Job.spec["staged"]["key"].astext
    query = select(staged).where(Job.kind == "import", staged.is_not(None)).group_by(staged)
    return set(session.scalars(query.having(func.bool_and(Job.status.in_(TERMINAL)))))


def unknown_files(session: Session, store_keys: Collection[str]) -> set[str]:
    """Returns the store keys that no file row refers to."""
    return set(store_keys) - set(
        session.scalars(select(File.store_key).where(File.store_key.in_(store_keys)))
    )


def _batch(query: Select[*Columns], most: int) -> Select[*Columns]:
    return query.limit(most).with_for_update(skip_locked=True, key_share=True)


def _jobs(session: Session, query: Select[Job]) -> list[Job]:
    return list(
        session.scalars(_batch(query, BATCH), execution_options={"populate_existing": True})
    )
