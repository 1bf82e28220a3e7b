"""Queries of health checks and metrics, over all projects."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.contracts.messages import JobStatus
from app.db.schema.tables import Attempt, Checkpoint, File, Job, Model
from app.db.schema.traffic_tables import StoredUsage

MAX_SPEEDS = 100  # running jobs that have their own metric


@dataclass(frozen=True)
class ServerFacts:
    """Clock and settings of the database server, and the number of jobs with a valid lease.

    `is_durable` is False if one of the settings in DURABILITY is off.
    """

    now: datetime
    version: str
    is_durable: bool
    num_running: int


def ping(session: Session) -> None:
    """Executes a trivial statement. Raises DatabaseUnavailable if the server does not respond."""
    session.execute(text("SELECT 1"))


def server_facts(session: Session) -> ServerFacts:
    """Reads the facts that `stillhouse doctor` checks."""
    shown = {name: session.execute(text(f"SHOW {name}")).scalar_one() for name in DURABILITY}
    running = select(func.count()).where(
        Job.status == JobStatus.running, Job.lease_expires_at > func.now()
    )
    return ServerFacts(
        now=session.execute(select(func.clock_timestamp())).scalar_one(),
        version=str(session.execute(text("SHOW server_version")).scalar_one()),
        is_durable="off" not in shown.values(),
        num_running=session.execute(running).scalar_one(),
    )


def queue_age_seconds(session: Session) -> float:
    """Returns how long the oldest due job has waited for a train worker; 0 if none waits."""
    oldest = select(func.min(Job.run_after)).where(
        Job.status == JobStatus.queued, Job.run_after <= func.now()
    )
    age = select(func.extract("epoch", func.now() - oldest.scalar_subquery()))
    return float(session.scalar(age) or 0.0)


def trainer_speeds(session: Session) -> dict[str, float]:
    """Returns the tokens per second of running jobs, by job id, as last reported."""
    speed = Job.progress["tokens_per_second"].as_float()
    running = select(Job.id, speed).where(Job.status == JobStatus.running, speed.is_not(None))
    rows = session.execute(running.order_by(Job.id).limit(MAX_SPEEDS))
    return {job_id: float(value) for job_id, value in rows}


def stored_bytes(session: Session) -> dict[str, int]:
    """Returns the total size of what the rows refer to, by kind. Scans whole tables."""
    sizes = {
        "files": select(func.sum(File.bytes)),
        "models": select(func.sum(Model.bytes)),
        "checkpoints": select(func.sum(Checkpoint.bytes)),
        "completions": select(func.sum(StoredUsage.bytes)),
    }
    return {kind: int(session.scalar(size) or 0) for kind, size in sizes.items()}


def attempts_by_outcome(session: Session) -> dict[str, int]:
    """Returns the number of ended attempts by outcome, such as `lost`. Scans the whole table."""
    ended = select(Attempt.outcome, func.count()).where(Attempt.outcome.is_not(None))
    return {
        str(outcome): count for outcome, count in session.execute(ended.group_by(Attempt.outcome))
    }


DURABILITY = ("fsync", "synchronous_commit", "full_page_writes")
