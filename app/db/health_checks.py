"""Health checks of the database."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.contracts.messages import JobStatus
from app.db.schema.tables import Job


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


DURABILITY = ("fsync", "synchronous_commit", "full_page_writes")
