"""Advisory lock that makes checking a quota and inserting a row atomic."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session


def lock_project(session: Session, project_id: str) -> None:
    """Acquires the project's lock until the transaction ends.

    Every transaction that adds something with a quota to the project must call it before counting.
    """
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(project_id, 0))))
