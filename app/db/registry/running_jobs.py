"""Queries of the running jobs, with the age of their heartbeats by the clock of the database."""

from dataclasses import dataclass

from sqlalchemy import func, literal, select
from sqlalchemy.orm import Session

from app.contracts.messages import JobStatus
from app.db.schema.table import Json
from app.db.schema.tables import Job

MAX_JOBS = 200  # per response
# As a literal, because a generic plan for a bound parameter could not use the partial index.
IS_RUNNING = Job.status == literal(JobStatus.running.value, literal_execute=True)


@dataclass(frozen=True)
class RunningJob:
    """A job that a worker runs, and its lease."""

    id: str
    kind: str
    model_id: str
    lease_owner: str
    attempt: int
    stage: str | None
    progress: Json
    heartbeat_age_seconds: float
    lease_seconds: float


def list_running_jobs(session: Session, project_id: str | None) -> list[RunningJob]:
    """Returns the running jobs of a project, or of all projects if it is None, by their ids."""
    now = func.clock_timestamp()
    query = select(
        Job.id,
        Job.kind,
        Job.model_id,
        Job.lease_owner,
        Job.attempt,
        Job.stage,
        Job.progress,
        func.extract("epoch", now - func.coalesce(Job.last_heartbeat_at, now)),
        func.extract("epoch", Job.lease_expires_at - now),
    ).where(IS_RUNNING, Job.deleted_at.is_(None))
    if project_id is not None:
        query = query.where(Job.project_id == project_id)
    rows = session.execute(query.order_by(Job.id).limit(MAX_JOBS))
    return [
        RunningJob(*row[:3], row[3] or "", *row[4:7], float(row[7]), float(row[8])) for row in rows
    ]


def count_running_jobs(session: Session) -> int:
    """Returns the number of running jobs of all projects."""
    return session.scalar(select(func.count()).select_from(Job).where(IS_RUNNING)) or 0
