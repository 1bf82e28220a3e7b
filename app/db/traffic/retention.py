"""Deletes stored completions that are too old, or that exceed the limit of their project."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.schema.traffic_tables import StoredCompletion, StoredUsage
from app.db.traffic.completions import delete_completions


def projects_with_traffic(session: Session) -> list[str]:
    """Returns the ids of all projects that have stored completions."""
    query = select(StoredUsage.project_id).where(StoredUsage.num_completions > 0)
    return list(session.scalars(query.order_by(StoredUsage.project_id)))


def delete_old(session: Session, project_id: str, max_age_seconds: float, most: int) -> int:
    """Deletes up to `most` of the project's completions above this age; returns how many."""
    cutoff = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, max_age_seconds)
    query = select(StoredCompletion.id).where(
        StoredCompletion.project_id == project_id, StoredCompletion.created_at < cutoff
    )
    query = query.order_by(StoredCompletion.created_at, StoredCompletion.id).limit(most)
    return delete_completions(session, project_id, list(session.scalars(query)))


def delete_excess(session: Session, project_id: str, max_bytes: int, most: int) -> int:
    """Deletes up to `most` of the oldest completions while the project has more than `max_bytes`.

    Returns how many were deleted.
    """
    usage = session.get(StoredUsage, project_id)
    excess = usage.bytes - max_bytes if usage is not None else 0
    if excess <= 0:
        return 0
    query = select(StoredCompletion.id, StoredCompletion.bytes)
    query = query.where(StoredCompletion.project_id == project_id)
    query = query.order_by(StoredCompletion.created_at, StoredCompletion.id).limit(most)
    ids = []
    for completion_id, num_bytes in session.execute(query):
        if excess <= 0:
            break
        ids.append(completion_id)
        excess -= num_bytes
    return delete_completions(session, project_id, ids)
