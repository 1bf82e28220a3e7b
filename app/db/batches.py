"""Queries and changes of batches. One API process at a time runs a batch, under a lease.

A result is recorded only while the batch is `in_progress` and the writer holds the lease. Any later
state freezes the results, so the output file cannot miss one that a stale runner still writes.
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
from app.db.usage.records import Usage, add_batch_answer
from app.db.webhooks.outbox import add_batch_event

LIFETIME: Final = timedelta(hours=24)  # the only completion window that is supported
UNDER_WAY: Final = frozenset({BatchStatus.validating, BatchStatus.in_progress})
ENDING: Final = frozenset({BatchStatus.cancelling, BatchStatus.finalizing})


def insert_batch(
    session: Session, *, errors: Sequence[Json], **columns: Any
) -> Batch:  # Any: the columns of Batch, by name
    """Inserts a batch that waits for a runner, or that has failed if there are errors."""
    if errors:
        columns |= {"errors": clean(errors), "failed_at": func.now()}
    status = BatchStatus.failed if errors else BatchStatus.validating
    row = Batch(status=status, expires_at=func.now() + LIFETIME, **columns)
    session.add(row)
    session.flush()
    session.refresh(row)
    add_batch_event(session, row)
    return row


def find_batch(session: Session, project_id: str, batch_id: str) -> Batch | None:
    """Returns the project's batch with this id, or None."""
    query = select(Batch).where(Batch.id == batch_id, Batch.project_id == project_id)
    return session.scalars(query).one_or_none()


def find_recent(
    session: Session, seconds: float, **columns: Any
) -> Batch | None:  # Any: columns of Batch
    """Returns the newest matching batch that was created in the last `seconds`, or None.

    Batches whose cancellation was requested are ignored.
    """
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
    """Returns a page of the project's batches, and whether more follow. Raises UnknownCursor."""
    query = select(Batch).where(Batch.project_id == project_id)
    return keyset_page(session, query, Batch, after=after, limit=limit, order=order)


def count_active(session: Session, project_id: str) -> int:
    """Returns the number of the project's batches that have not ended."""
    query = select(func.count()).select_from(Batch)
    return (
        session.scalar(
            query.where(Batch.project_id == project_id, Batch.status.not_in(ENDED_BATCHES))
        )
        or 0
    )


def request_cancel(session: Session, batch_id: str) -> Batch | None:
    """Requests the cancellation of a batch.

    Returns None if it has ended, is being cancelled or is already creating its files.
    """
    change = update(Batch).where(Batch.id == batch_id, Batch.status.in_(UNDER_WAY))
    return _changed(session, change.values(status=BatchStatus.cancelling, cancelling_at=func.now()))


def claim(session: Session, lease_seconds: float, *, only_ending: bool = False) -> Batch | None:
    """Claims the oldest batch without a valid lease, with a new lease token.

    Returns None if there is no such batch.

    only_ending: Claims only a batch whose remaining work is to create its files.
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
    # Any: columns of Batch
    columns: dict[str, Any] = {
        "lease_token": token,
        "lease_expires_at": func.now(),
    }
    if batch.status == BatchStatus.validating:
        columns |= {"status": BatchStatus.in_progress, "in_progress_at": func.now()}
    session.execute(update(Batch).where(Batch.id == batch.id).values(**columns))
    return renew(session, batch.id, token, lease_seconds)  # also checks the deadline


def renew(session: Session, batch_id: str, token: int, lease_seconds: float) -> Batch | None:
    """Renews the lease and returns the current row, or None if the lease is lost.

    A batch in progress whose completion window has passed becomes `finalizing`.
    """
    over = update(Batch).where(*_is_ours(batch_id, token), Batch.status == BatchStatus.in_progress)
    over = over.where(Batch.expires_at <= func.now())
    session.execute(over.values(status=BatchStatus.finalizing, finalizing_at=func.now()))
    expires_at = func.now() + timedelta(seconds=lease_seconds)
    return _changed(
        session, update(Batch).where(*_is_ours(batch_id, token)).values(lease_expires_at=expires_at)
    )


def release(session: Session, batch_id: str, token: int) -> None:
    """Ends the lease, so that another process can continue the batch immediately."""
    freed = (
        update(Batch)
        .where(*_is_ours(batch_id, token))
        .values(lease_token=None, lease_expires_at=None)
    )
    session.execute(freed)


def answered_lines(session: Session, batch_id: str) -> set[int]:
    """Returns the numbers of the input lines whose results are recorded."""
    return set(session.scalars(select(BatchResult.line).where(BatchResult.batch_id == batch_id)))


def record(
    session: Session,
    batch_id: str,
    token: int,
    *,
    line: int,
    output: str,
    is_error: bool,
    usage: Usage | None = None,
) -> bool:
    """Records the result of an input line. A second result for the same line is ignored.

    The usage is added to that of the batch, its key and its project. Returns False if the lease is
    lost or the batch is no longer in progress.
    """
    in_progress = select(Batch.project_id, Batch.created_by_key_id).where(
        *_is_ours(batch_id, token), Batch.status == BatchStatus.in_progress
    )
    owner = session.execute(in_progress.with_for_update(key_share=True)).one_or_none()
    if owner is None:
        return False
    fresh = insert(BatchResult).values(
        batch_id=batch_id, line=line, output=output, is_error=is_error
    )
    if session.scalar(fresh.on_conflict_do_nothing().returning(BatchResult.line)) is not None:
        counter = Batch.num_failed if is_error else Batch.num_completed
        changes: dict[Any, Any] = {counter: counter + 1}  # Any: columns and SQL expressions
        if usage is not None:
            changes[Batch.model] = func.coalesce(Batch.model, usage.model)
            changes[Batch.input_tokens] = Batch.input_tokens + usage.input_tokens
            changes[Batch.cached_tokens] = Batch.cached_tokens + usage.cached_tokens
            changes[Batch.output_tokens] = Batch.output_tokens + usage.output_tokens
        session.execute(update(Batch).where(Batch.id == batch_id).values(changes))
        if usage is not None:
            add_batch_answer(session, *owner, usage)
    return True


def begin_finalizing(session: Session, batch_id: str, token: int) -> Batch | None:
    """Freezes the results of a batch and returns its row, or None if the lease is lost."""
    in_progress = update(Batch).where(
        *_is_ours(batch_id, token), Batch.status == BatchStatus.in_progress
    )
    session.execute(in_progress.values(status=BatchStatus.finalizing, finalizing_at=func.now()))
    return session.scalars(select(Batch).where(*_is_ours(batch_id, token))).one_or_none()


def results_after(
    session: Session, batch_id: str, line: int, *, max_rows: int, max_bytes: int
) -> list[BatchResult]:
    """Returns the results of the lines after `line`, in order, up to both limits.

    A result that alone exceeds `max_bytes` is returned as the only one.
    """
    size = func.octet_length(BatchResult.output)  # Postgres knows it without reading the text
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
    """Ends the batch, inserts the rows of its files and deletes its results.

    `output_file` and `error_file` contain columns of File. Returns False, without changes, if the
    lease is lost or the results are not frozen yet.
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
    add_batch_event(session, batch)
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
