"""State machine of a job: the legal transitions, and the function that carries them out.

Each transition is one guarded UPDATE, with its event in the same transaction. The end of a job also
adds its webhook event there. `succeeded` and `cancelled` are final; a `failed` job can only be
resumed. A transition out of `running` ends the lease, so further writes of its worker are refused.
"""

import time
from collections.abc import Collection
from typing import Any, Final, Literal

from sqlalchemy import func, null, select, update
from sqlalchemy.orm import Session

from app.contracts.messages import TERMINAL, JobStatus
from app.db.schema.ids import new_id
from app.db.schema.json_values import clean, clean_text
from app.db.schema.table import Json
from app.db.schema.tables import Attempt, Event, Job
from app.db.webhooks.outbox import add_job_event

Level = Literal["info", "warn", "error"]
MESSAGE_CHARACTERS: Final = 4000
KEPT_STAGES: Final = 60

LEGAL: Final[dict[JobStatus, frozenset[JobStatus]]] = {
    JobStatus.queued: frozenset(
        {JobStatus.running, JobStatus.paused, JobStatus.cancelled, JobStatus.failed}
    ),
    JobStatus.running: frozenset(
        {
            JobStatus.succeeded,
            JobStatus.failed,
            JobStatus.cancelled,
            JobStatus.paused,
            JobStatus.queued,
            JobStatus.retry_wait,
        }
    ),
    JobStatus.retry_wait: frozenset(
        {JobStatus.queued, JobStatus.paused, JobStatus.cancelled, JobStatus.failed}
    ),
    JobStatus.paused: frozenset({JobStatus.queued, JobStatus.cancelled}),
    JobStatus.succeeded: frozenset(),
    JobStatus.failed: frozenset({JobStatus.queued}),
    JobStatus.cancelled: frozenset(),
}


def sources_of(status: JobStatus) -> frozenset[JobStatus]:
    """Returns the states from which a job may change to this state."""
    return frozenset(source for source, targets in LEGAL.items() if status in targets)


def move(
    session: Session,
    job_id: str,
    to: JobStatus,
    *,
    message: str,
    sources: Collection[JobStatus] | None = None,
    token: int | None = None,
    outcome: str | None = None,
    level: Level = "info",
    **columns: Any,  # Any: more columns of Job to set, by name
) -> Job | None:
    """Changes the state of a job and records an event with `message`.

    Returns None, without changes, if the job does not exist or the transition is not allowed.

    sources: Restricts the states from which the job may change; None allows all legal ones.
    token: If given, the job must be leased with this token.
    outcome: Outcome of the attempt that was running; by default, the name of the new state.
    """
    before = lock_job(session, job_id)
    allowed = sources_of(to) if sources is None else sources_of(to) & frozenset(sources)
    if (
        before is None
        or before.status not in allowed
        or (token is not None and before.lease_token != token)
    ):
        return None
    was_running = before.status == JobStatus.running
    if was_running:
        columns.setdefault("stages", end_stages(before.stages, outcome or to.value))
        columns |= {"lease_token": None, "lease_owner": None, "lease_expires_at": None}
    if to in TERMINAL:
        columns |= {"finished_at": func.now()}
    elif before.status in TERMINAL:
        columns |= {"finished_at": None, "error": null()}
    if to != JobStatus.running:
        columns |= {"stage": None}
    if to != JobStatus.paused:
        columns |= {"pause_reason": None}
    change = update(Job).where(Job.id == job_id, Job.status.in_(allowed))
    if token is not None:
        change = change.where(Job.lease_token == token)
    change = change.values(status=to.value, **columns)
    job = session.scalars(
        change.returning(Job),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one_or_none()
    if job is None:
        return None
    if was_running:
        open_attempt = update(Attempt).where(Attempt.job_id == job_id, Attempt.ended_at.is_(None))
        session.execute(open_attempt.values(ended_at=func.now(), outcome=outcome or to.value))
    add_event(session, job_id, message, type="state", level=level, data={"status": public_name(to)})
    if to in TERMINAL:
        add_job_event(session, job)
    return job


def lock_job(session: Session, job_id: str) -> Job | None:
    """Returns the current row of the job, or None, and locks it until the transaction ends.

    Until then, no other transaction can change the job or add events to its history.
    """
    query = select(Job).where(Job.id == job_id).with_for_update(key_share=True)
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def add_event(
    session: Session,
    job_id: str,
    message: str,
    *,
    type: str = "message",  # noqa: A002  # the column's name
    level: Level = "info",
    data: Json | None = None,
) -> Event:
    """Appends an event to a job's history.

    Locks the job, so that `seq` increases in the order of commits.
    """
    lock_job(session, job_id)
    event = Event(
        id=new_id("ftevent-"),
        job_id=job_id,
        level=level,
        type=type,
        message=clean_text(message)[:MESSAGE_CHARACTERS],
        data=clean(data or {}),
    )
    session.add(event)
    session.flush()
    return event


def begin_stage(stages: list[Json], name: str) -> list[Json]:
    """Returns the stages with a new running one; the stage that was running has succeeded.

    Times are in seconds since the epoch. Only the last KEPT_STAGES stages are kept.
    """
    begun = {"name": name, "status": "running", "started_at": int(time.time()), "finished_at": None}
    return [*end_stages(stages, "succeeded"), begun][-KEPT_STAGES:]


def end_stages(stages: list[Json], status: str) -> list[Json]:
    """Returns the stages, with `status` for the one that was running."""
    ended = {"status": status, "finished_at": int(time.time())}
    return [{**stage, **ended} if stage["status"] == "running" else stage for stage in stages]


def public_name(status: JobStatus) -> str:
    """Returns the name of the state in the API, where `retry_wait` is shown as `queued`."""
    return JobStatus.queued.value if status == JobStatus.retry_wait else status.value
