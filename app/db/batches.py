"""Batches: inserted, read, run by one API process at a time under a lease, and ended with their files.

A line is recorded only while the batch is in progress and the lease is the writer's: whatever state comes next
freezes the results, so a file made from them misses nothing that a runner of before may still write.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.files import insert_file
from app.db.pagination import Order, keyset_page
from app.db.schema.json_values import clean
from app.db.schema.table import Json
from app.db.schema.tables import ENDED_BATCHES, Batch, BatchResult, BatchStatus, lease_tokens

LIFETIME: Final = timedelta(hours=24)  # the one completion window there is
UNDER_WAY: Final = frozenset({BatchStatus.validating, BatchStatus.in_progress})
ENDING: Final = frozenset({BatchStatus.cancelling, BatchStatus.finalizing})


def insert_batch(
    session: Session, *, errors: Sequence[Json], **columns: Any
) -> Batch:  # Any: the columns of Batch, by name
    """A batch that waits for a runner, or has failed if there are errors."""
    if errors:
        columns |= {"errors": clean(errors), "failed_at": func.now()}
    status = BatchStatus.failed if errors else BatchStatus.validating
    row = Batch(status=status, expires_at=func.now() + LIFETIME, **columns)
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def find_batch(session: Session, project_id: str, batch_id: str) -> Batch | None:
    query = select(Batch).where(Batch.id == batch_id, Batch.project_id == project_id)
    return session.scalars(query).one_or_none()


def find_recent(
    session: Session, seconds: float, **columns: Any
) -> Batch | None:  # Any: columns of Batch
    """The newest batch with these columns that was made within the last `seconds`, and that nobody has cancelled."""
    query = (
        select(Batch)
        .filter_by(**columns)
        .where(Batch.created_at > func.now() - timedelta(seconds=seconds))
    )
    query = query.where(Batch.cancelling_at.is_(None)).order_by(Batch.created_at.desc())
    return session.scalars(query.limit(1)).one_or_none()


def page_batches(
    session: Session, project_id: str, *, after: str | None, limit: int, order: Order
) -> tuple[list[Batch], bool]:
    """A page of the project's batches and whether more follow. Raises UnknownCursor."""
    query = select(Batch).where(Batch.project_id == project_id)
    return keyset_page(session, query, Batch, after=after, limit=limit, order=order)


def count_active(session: Session, project_id: str) -> int:
    """Batches of the project that have not ended."""
    query = select(func.count()).select_from(Batch)
    return (
        session.scalar(
            query.where(Batch.project_id == project_id, Batch.status.not_in(ENDED_BATCHES))
        )
        or 0
    )


def request_cancel(session: Session, batch_id: str) -> Batch | None:
    """Asks a batch to stop; None if it was not under way."""
    change = update(Batch).where(Batch.id == batch_id, Batch.status.in_(UNDER_WAY))
    return _changed(session, change.values(status=BatchStatus.cancelling, cancelling_at=func.now()))


def claim(session: Session, lease_seconds: float, *, only_ending: bool = False) -> Batch | None:
    """Takes the oldest batch that nobody runs, with a new lease token; None if there is none.

    only_ending: just one that needs no more answers, only its files.
    """
    is_free = or_(Batch.lease_expires_at.is_(None), Batch.lease_expires_at < func.now())
    wanted = ENDING if only_ending else ENDING | UNDER_WAY
    due = (
        select(Batch).where(Batch.status.in_(wanted), is_free).order_by(Batch.created_at, Batch.id)
    )
    batch = session.scalars(
        due.limit(1).with_for_update(skip_locked=True, key_share=True)
    ).one_or_none()
    if batch is None:
        return None
    token = session.scalar(lease_tokens)
    assert token is not None
    columns: dict[str, Any] = {
        "lease_token": token,
        "lease_expires_at": func.now(),
    }  # Any: columns of Batch
    if batch.status == BatchStatus.validating:
        columns |= {"status": BatchStatus.in_progress, "in_progress_at": func.now()}
    session.execute(update(Batch).where(Batch.id == batch.id).values(**columns))
    return renew(session, batch.id, token, lease_seconds)  # which ends it if it is time


def renew(session: Session, batch_id: str, token: int, lease_seconds: float) -> Batch | None:
    """The batch as it is now, finalizing if its time is up; None if the lease belongs to somebody else."""
    over = update(Batch).where(*_is_ours(batch_id, token), Batch.status == BatchStatus.in_progress)
    over = over.where(Batch.expires_at <= func.now())
    session.execute(over.values(status=BatchStatus.finalizing, finalizing_at=func.now()))
    expires_at = func.now() + timedelta(seconds=lease_seconds)
    return _changed(
        session, update(Batch).where(*_is_ours(batch_id, token)).values(lease_expires_at=expires_at)
    )


def release(session: Session, batch_id: str, token: int) -> None:
    """Lets another process go on at once."""
    freed = (
        update(Batch)
        .where(*_is_ours(batch_id, token))
        .values(lease_token=None, lease_expires_at=None)
    )
    session.execute(freed)


def answered_lines(session: Session, batch_id: str) -> set[int]:
    return set(session.scalars(select(BatchResult.line).where(BatchResult.batch_id == batch_id)))


def record(
    session: Session, batch_id: str, token: int, *, line: int, output: str, is_error: bool
) -> bool:
    """Keeps the answer to a line, once; False if the batch is no longer the caller's to write to."""
    in_progress = select(Batch.id).where(
        *_is_ours(batch_id, token), Batch.status == BatchStatus.in_progress
    )
    if session.scalar(in_progress.with_for_update(key_share=True)) is None:
        return False
    fresh = insert(BatchResult).values(
        batch_id=batch_id, line=line, output=output, is_error=is_error
    )
    if session.scalar(fresh.on_conflict_do_nothing().returning(BatchResult.line)) is not None:
        counter = Batch.num_failed if is_error else Batch.num_completed
        session.execute(update(Batch).where(Batch.id == batch_id).values({counter: counter + 1}))
    return True


def begin_finalizing(session: Session, batch_id: str, token: int) -> Batch | None:
    """The batch with its results frozen; None if the lease belongs to somebody else."""
    in_progress = update(Batch).where(
        *_is_ours(batch_id, token), Batch.status == BatchStatus.in_progress
    )
    session.execute(in_progress.values(status=BatchStatus.finalizing, finalizing_at=func.now()))
    return session.scalars(select(Batch).where(*_is_ours(batch_id, token))).one_or_none()


def results_after(
    session: Session, batch_id: str, line: int, *, max_rows: int, max_bytes: int
) -> list[BatchResult]:
    """A page of the results of lines after `line`, in order: at most so many rows and bytes of output.

    A single result of more bytes than that is a page of its own.
    """
    size = func.octet_length(BatchResult.output)  # PostgreSQL knows it without reading the text
    sizes = (
        select(BatchResult.line, size.label("size"))
        .where(BatchResult.batch_id == batch_id, BatchResult.line > line)
        .order_by(BatchResult.line)
        .limit(max_rows)
        .subquery()
    )
    total = func.sum(sizes.c.size).over(order_by=sizes.c.line)
    sums = select(sizes.c.line, sizes.c.size, total.label("total")).subquery()
    is_first = sums.c.total == sums.c.size
    last = (
        select(func.max(sums.c.line))
        .where(or_(sums.c.total <= max_bytes, is_first))
        .scalar_subquery()
    )
    page = select(BatchResult).where(BatchResult.batch_id == batch_id, BatchResult.line > line)
    return list(session.scalars(page.where(BatchResult.line <= last).order_by(BatchResult.line)))


def finish(
    session: Session,
    batch_id: str,
    token: int,
    status: BatchStatus,
    *,
    output_file: Json | None,
    error_file: Json | None,
) -> bool:
    """Ends the batch, makes its files known (the columns of File) and forgets its results, all or nothing.

    False, and nothing done, if the lease belongs to somebody else.
    """
    change = update(Batch).where(*_is_ours(batch_id, token), Batch.status.in_(ENDING))
    ended = change.values(
        {
            "status": status,
            f"{status}_at": func.now(),
            "output_file_id": output_file["id"] if output_file else None,
            "error_file_id": error_file["id"] if error_file else None,
            "lease_token": None,
            "lease_expires_at": None,
        }
    )
    batch = _changed(session, ended)
    if batch is None:
        return False
    for columns in filter(None, (output_file, error_file)):
        if batch.output_expires_seconds is not None:
            columns = {
                **columns,
                "expires_at": func.now() + timedelta(seconds=batch.output_expires_seconds),
            }
        insert_file(session, project_id=batch.project_id, purpose="batch_output", **columns)
    session.execute(delete(BatchResult).where(BatchResult.batch_id == batch_id))
    return True


def _is_ours(batch_id: str, token: int) -> Sequence[ColumnElement[bool]]:
    return (Batch.id == batch_id, Batch.lease_token == token)


def _changed(
    session: Session, change: Any
) -> Batch | None:  # Any: SQLAlchemy's Update, before its returning()
    query = change.returning(Batch)
    found: Batch | None = session.scalars(
        query, execution_options={"populate_existing": True, "synchronize_session": False}
    ).one_or_none()
    return found
