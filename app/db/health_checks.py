"""Health checks of the database."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.contracts.messages import JobStatus
from app.db.schema.tables import Job


@dataclass(frozen=True)
class ServerFacts:
    """The server's clock and settings, and how many jobs run under a lease that has not expired."""

    now: datetime
    version: str
    is_durable: bool
    num_running: int


def ping(session: Session) -> None:
    """Sends the cheapest statement there is. Raises DatabaseUnavailable if no answer comes."""
    session.execute(text("SELECT 1"))


def server_facts(session: Session) -> ServerFacts:
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
