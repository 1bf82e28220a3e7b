"""One at a time, where a count is read before something is added to it."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session


def lock_project(session: Session, project_id: str) -> None:
    """Waits for other transactions that add to the project; a quota counted behind it holds until this one ends."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(project_id, 0))))
