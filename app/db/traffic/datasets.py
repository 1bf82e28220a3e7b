"""Writes of data sets: the end of the job that makes one, and its deletion."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.contracts.messages import JobStatus
from app.db.files import delete_file, find_file, insert_file, readers_of_file
from app.db.job_states import move
from app.db.leases import cancel, hold
from app.db.schema.json_values import clean
from app.db.schema.table import Json
from app.db.schema.tables import File, Job


def finish_dataset(
    session: Session, job_id: str, token: int, *, files: Sequence[Json], result: Json
) -> Job | None:
    """Registers the files of a data set and ends its job as succeeded.

    Cancels the job instead if that was requested. Returns None, without changes, if the lease is
    lost. `files` has columns of File.
    """
    job = hold(session, job_id, token)
    if job is None:
        return None
    if job.cancel_requested_at is not None:
        return cancel(session, job_id, token)
    for columns in files:
        insert_file(session, project_id=job.project_id, **columns)
    return move(
        session,
        job_id,
        JobStatus.succeeded,
        token=token,
        message="The data set is complete.",
        result=clean(result),
        result_file_ids=[columns["id"] for columns in files],
        progress=clean({**job.progress, "percent": 100.0}),
    )


def delete_files(session: Session, job: Job) -> tuple[list[str], list[str]]:
    """Deletes the rows of a data set's files; returns their store keys, and ids of their readers.

    The caller rolls the deletion back if there are readers. Files that were deleted before are
    skipped.
    """
    project_id = job.project_id or ""
    keys, readers = [], []
    for file_id in job.result_file_ids:
        row = find_file(session, project_id, file_id)
        # Deleted first: this waits for a transaction that is queueing a job with the file.
        if row is not None and delete_file(session, project_id, file_id):
            keys.append(row.store_key)
            readers += readers_of_file(session, project_id, file_id)
    return keys, readers


def existing_files(session: Session, file_ids: Sequence[str]) -> set[str]:
    """Returns those of the files that still exist."""
    return set(session.scalars(select(File.id).where(File.id.in_(file_ids))))
