"""Runs of experiment trackers: which metrics of a job are to be sent next, and which were sent.

A batch is recorded in `sending` before it is sent. If the process is killed, the next one sends the
same batch again, so that a tracker can recognise it. Every function locks a job before its runs.
"""

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, func, null, select, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from app.contracts.messages import TERMINAL
from app.contracts.trackers import MetricPoint, TrackerName
from app.db.job_states import add_event, lock_job
from app.db.schema.tables import Job
from app.db.schema.tracker_tables import TrackerRun

# MLflow accepts at most 1,000 metrics in one request.
BATCH_POINTS: Final = 1000
# Longer than any delivery takes. Until then, no other process sends the same batch.
CLAIM_SECONDS: Final = 120.0
FIRST_BACKOFF_SECONDS: Final = 5.0
MAX_BACKOFF_SECONDS: Final = 600.0
GIVE_UP_SECONDS: Final = 7 * 86_400.0  # after the end of the job

# Reads the names of the metrics by their index, then the next steps of each name.
POINTS = text(
    """
    WITH RECURSIVE names AS (
        (SELECT name FROM job_metrics WHERE job_id = :job_id ORDER BY name LIMIT 1)
        UNION ALL
        SELECT (
            SELECT m.name FROM job_metrics m
            WHERE m.job_id = :job_id AND m.name > names.name ORDER BY m.name LIMIT 1
        )
        FROM names WHERE names.name IS NOT NULL
    )
    SELECT p.name, p.step, p.value, p.created_at
    FROM names, LATERAL (
        SELECT m.name, m.step, m.value, extract(epoch FROM m.created_at)::float AS created_at
        FROM job_metrics m
        WHERE m.job_id = :job_id AND m.name = names.name
            AND m.step > coalesce((CAST(:sent AS jsonb) ->> names.name)::bigint, -1)
            AND (
                CAST(:sending AS jsonb) IS NULL
                OR m.step <= (CAST(:sending AS jsonb) ->> names.name)::bigint
            )
        ORDER BY m.step LIMIT :most
    ) p
    ORDER BY p.step, p.name LIMIT :most
    """
).bindparams(bindparam("sent", type_=JSONB), bindparam("sending", type_=JSONB(none_as_null=True)))


@dataclass(frozen=True)
class Claim:
    """A batch that this process sends now. The last batch has no points and `is_end` is True."""

    run: TrackerRun
    job: Job
    points: tuple[MetricPoint, ...]
    is_end: bool


def add_runs(session: Session, job: Job) -> None:
    """Inserts the runs of a new job, one for each integration in its request."""
    for integration in job.request.get("integrations") or ():
        name = integration["type"]
        session.add(TrackerRun(job_id=job.id, type=name, options=integration.get(name) or {}))


def reopen_runs(session: Session, job_id: str) -> None:
    """Continues the runs of a failed job that is resumed. The caller has locked the job."""
    runs = update(TrackerRun).where(TrackerRun.job_id == job_id)
    session.execute(runs.values(closed_at=None, due_at=func.now()))


def claim(session: Session, tracker: TrackerName, idle_seconds: float) -> Claim | None:
    """Returns the next batch for a tracker, or None if there is nothing to send.

    Runs without new metrics are examined again after `idle_seconds`.
    """
    query = (
        select(TrackerRun)
        .where(
            TrackerRun.closed_at.is_(None),
            TrackerRun.due_at <= func.now(),
            TrackerRun.type == tracker,
        )
        .order_by(TrackerRun.due_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    fresh = {"populate_existing": True}
    while (run := session.scalars(query, execution_options=fresh).one_or_none()) is not None:
        job = session.get_one(Job, run.job_id, populate_existing=True)
        points = _next_points(session, run)
        is_end = not points and job.status in TERMINAL
        if points or is_end:
            last_steps = {point.name: point.step for point in points}
            claimed = _of(run).values(
                sending=last_steps or null(),
                num_claims=TrackerRun.num_claims + 1,
                due_at=_after(CLAIM_SECONDS),
            )
            session.execute(claimed)
            session.refresh(run)
            return Claim(run, job, points, is_end)
        session.execute(_of(run).values(due_at=_after(idle_seconds), sending=null()))
    return None


def finish_batch(
    session: Session, claimed: Claim, state: dict[str, Any], wait_seconds: float
) -> None:
    """Records that a batch was sent, and closes the run if the batch was the end of the job.

    The run stays open if the job has been resumed since. The next batch follows after
    `wait_seconds`, or at once if the job has ended or the batch was full.

    state: What the tracker returned, as JSON.
    """
    run = claimed.run
    job = lock_job(session, run.job_id)
    if job is None:
        return
    is_urgent = job.status in TERMINAL or len(claimed.points) == BATCH_POINTS
    # A job that was resumed since may have ended again, even with the same status.
    closes = claimed.is_end and job.finished_at == claimed.job.finished_at
    change = _of(run).where(TrackerRun.num_claims == run.num_claims)
    session.execute(
        change.values(
            state=state,
            sent={**run.sent, **(run.sending or {})},
            sending=null(),
            num_failures=0,
            due_at=_after(0 if is_urgent else wait_seconds),
            closed_at=func.now() if closes else null(),
        )
    )


def postpone_batch(session: Session, claimed: Claim, reason: str) -> None:
    """Records that a tracker did not accept a batch, which is sent again with a growing delay.

    The first failure of a run adds a warning to the job's events. A week after the end of the job,
    the run is closed with another warning.
    """
    run = claimed.run
    job = lock_job(session, run.job_id)
    current = select(TrackerRun).where(
        TrackerRun.job_id == run.job_id,
        TrackerRun.type == run.type,
        TrackerRun.num_claims == run.num_claims,
    )
    fresh = {"populate_existing": True}
    if job is None or session.scalars(current, execution_options=fresh).one_or_none() is None:
        return
    delay = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(run.num_failures, 20))
    values: dict[str, Any] = {"num_failures": run.num_failures + 1, "due_at": _after(delay)}
    if not run.is_warned:
        values["is_warned"] = True
        message = (
            f"The tracker {run.type} did not accept the metrics: {reason}. The job goes on, and "
            "the metrics are sent again later."
        )
        add_event(session, run.job_id, message, level="warn", data={"tracker": run.type})
    now = session.scalar(select(func.now()))
    if job.finished_at and now and (now - job.finished_at).total_seconds() > GIVE_UP_SECONDS:
        values["closed_at"] = func.now()
        message = f"The tracker {run.type} did not accept the metrics for a week: {reason}."
        add_event(session, run.job_id, message, level="warn", data={"tracker": run.type})
    session.execute(_of(run).values(**values))


def _next_points(session: Session, run: TrackerRun) -> tuple[MetricPoint, ...]:
    """Returns the points of the batch that was being sent, or of a new one."""
    values = {"sent": run.sent, "sending": run.sending, "most": BATCH_POINTS}
    return tuple(
        MetricPoint(*row) for row in session.execute(POINTS, {"job_id": run.job_id, **values})
    )


def _of(run: TrackerRun) -> Any:  # Any: SQLAlchemy's update, whose type the callers do not need
    return update(TrackerRun).where(TrackerRun.job_id == run.job_id, TrackerRun.type == run.type)


def _after(seconds: float) -> Any:  # Any: an SQL expression for a time
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
