"""Queries and changes of uploaded files.

An expired file is hidden from its owner, but kept for the jobs and batches that read it.
"""

from typing import Any

from sqlalchemy import ColumnElement, delete, func, or_, select
from sqlalchemy.orm import Session

from app.db.conditions import HAS_NOT_ENDED
from app.db.pagination import Order, keyset_page
from app.db.schema.tables import ENDED_BATCHES, Batch, File, Job


def insert_file(session: Session, **columns: Any) -> File:  # Any: the columns of File, by name
    """Inserts the row of a file whose bytes are in the store."""
    row = File(**columns)
    session.add(row)
    session.flush()
    return row


def find_file(
    session: Session, project_id: str, file_id: str, *, lock: bool = False
) -> File | None:
    """Returns the project's file, or None if it does not exist or has expired.

    With `lock`, the file cannot be deleted until the transaction ends.
    """
    query = select(File).where(File.id == file_id, File.project_id == project_id, _is_alive())
    if lock:
        query = query.with_for_update(read=True)
    return session.scalars(query).one_or_none()


def page_files(
    session: Session,
    project_id: str,
    *,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
) -> tuple[list[File], bool]:
    """Returns a page of the project's files, and whether more follow. Raises UnknownCursor."""
    query = select(File).where(File.project_id == project_id, _is_alive())
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    return keyset_page(session, query, File, after=after, limit=limit, order=order)


def count_files(session: Session, project_id: str) -> tuple[int, int]:
    """Returns the number of the project's files and their total size in bytes.

    Expired files count until the garbage collector has removed them.
    """
    counted = select(func.count(), func.coalesce(func.sum(File.bytes), 0)).where(
        File.project_id == project_id
    )
    num_files, num_bytes = session.execute(counted).one()
    return num_files, int(num_bytes)


def delete_file(session: Session, project_id: str, file_id: str) -> bool:
    """Deletes the row of a file, and returns whether there was one.

    The caller deletes the bytes after the transaction.
    """
    gone = delete(File).where(File.id == file_id, File.project_id == project_id)
    return session.scalar(gone.returning(File.id)) is not None


def readers_of_file(session: Session, project_id: str, file_id: str) -> list[str]:
    """Returns the ids of batches and jobs that read this file and have not ended."""
    jobs = select(Job.id).where(
        Job.project_id == project_id,
        or_(
            Job.training_file_id == file_id,
            Job.validation_file_id == file_id,
            Job.test_file_id == file_id,
        ),
        HAS_NOT_ENDED,
    )
    batches = select(Batch.id).where(
        Batch.project_id == project_id,
        Batch.input_file_id == file_id,
        Batch.status.not_in(ENDED_BATCHES),
    )
    return [*session.scalars(batches.order_by(Batch.id)), *session.scalars(jobs.order_by(Job.id))]


def _is_alive() -> ColumnElement[bool]:
    return or_(File.expires_at.is_(None), File.expires_at > func.now())
