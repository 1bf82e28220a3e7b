"""Inserts, reads, changes and deletes stored completions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeVarTuple

from sqlalchemy import ColumnElement, Select, delete, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.contracts.datasets import RecordFilter
from app.db.pagination import Order, UnknownCursor
from app.db.schema.traffic_tables import SpoolMark, StoredCompletion, StoredUsage

Columns = TypeVarTuple("Columns")
Place = tuple[datetime, str]  # (created_at, id), by which lists are ordered
# Postgres parses the records, because that would cost the API process more time.
INSERT_RECORDS: Final = text(
    """
    INSERT INTO stored_completions (
        id, project_id, key_id, model, metadata, request_id, request, messages, completion, bytes,
        latency_seconds, prompt_tokens, completion_tokens, created_at)
    SELECT id, project_id, key_id, model, metadata, request_id, request, messages, completion, bytes,
        latency_seconds, prompt_tokens, completion_tokens, to_timestamp(created_at)
    FROM json_to_recordset(CAST(:records AS json)) AS records (
        id text, project_id text, key_id text, model text, metadata jsonb, request_id text,
        request text, messages text, completion text, bytes bigint, latency_seconds float8,
        prompt_tokens int, completion_tokens int, created_at float8)
    ON CONFLICT DO NOTHING
    RETURNING project_id, bytes
    """
)


@dataclass(frozen=True)
class CompletionFilter:
    """Selects stored completions. A field that is empty selects all.

    metadata: Keys and values that a completion must all have.
    created_after, created_before: The interval of the request's time, without its end.
    """

    model: str | None = None
    metadata: Mapping[str, str] | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None

    @classmethod
    def of(cls, records: RecordFilter) -> "CompletionFilter":
        """Returns the filter of a job's specification."""
        return cls(
            records.model,
            records.metadata,
            time_of(records.created_after),
            time_of(records.created_before),
        )

    def conditions(self, project_id: str) -> list[ColumnElement[bool]]:
        """Returns the conditions on StoredCompletion for a project."""
        conditions = [StoredCompletion.project_id == project_id]
        if self.model is not None:
            conditions.append(StoredCompletion.model == self.model)
        if self.metadata:
            conditions.append(StoredCompletion.completion_metadata.contains(dict(self.metadata)))
        if self.created_after is not None:
            conditions.append(StoredCompletion.created_at >= self.created_after)
        if self.created_before is not None:
            conditions.append(StoredCompletion.created_at < self.created_before)
        return conditions


def time_of(seconds: float | None) -> datetime | None:
    """Returns the time that is this many seconds after the epoch."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def insert_records(
    session: Session, segment_id: str, first_number: int, lines: Sequence[bytes]
) -> int:
    """Inserts records of a spool segment and moves its mark; returns how many were inserted.

    Records before the mark are skipped, because an earlier call has inserted them. They may have
    been deleted since.

    first_number: Position in the segment of the first record, from 0.
    lines: The records, each a JSON object with the columns of StoredCompletion.
    """
    session.execute(insert(SpoolMark).values(id=segment_id, num_loaded=0).on_conflict_do_nothing())
    marked = select(SpoolMark.num_loaded).where(SpoolMark.id == segment_id).with_for_update()
    num_before = session.scalars(marked).one()
    fresh = lines[max(0, num_before - first_number) :]
    if not fresh:
        return 0
    records = (b"[" + b",".join(fresh) + b"]").decode()
    num_inserted = 0
    changes: dict[str, tuple[int, int]] = {}
    for project_id, num_bytes in session.execute(INSERT_RECORDS, {"records": records}):
        num_inserted += 1
        count, total = changes.get(project_id, (0, 0))
        changes[project_id] = (count + 1, total + num_bytes)
    for project_id in sorted(changes):  # sorted, so that two processes cannot deadlock
        _add_usage(session, project_id, *changes[project_id])
    _set_mark(session, segment_id, first_number + len(lines))
    return num_inserted


def skip_record(session: Session, segment_id: str, number: int) -> None:
    """Moves the mark of a segment past a record that cannot be inserted."""
    session.execute(insert(SpoolMark).values(id=segment_id, num_loaded=0).on_conflict_do_nothing())
    _set_mark(session, segment_id, number + 1)


def num_loaded(session: Session, segment_id: str) -> int:
    """Returns how many records of the segment have been inserted or skipped."""
    query = select(SpoolMark.num_loaded).where(SpoolMark.id == segment_id)
    return session.scalar(query) or 0


def forget_segment(session: Session, segment_id: str) -> None:
    """Deletes the mark of a segment whose file has been deleted."""
    session.execute(delete(SpoolMark).where(SpoolMark.id == segment_id))


def find_completion(
    session: Session, project_id: str, completion_id: str
) -> StoredCompletion | None:
    """Returns the project's stored completion with this id, or None."""
    query = select(StoredCompletion).where(*_is(project_id, completion_id))
    return session.scalars(query).one_or_none()


def page_completions(
    session: Session,
    project_id: str,
    wanted: CompletionFilter,
    *,
    after: str | None = None,
    limit: int = 20,
    order: Order = "asc",
    most_bytes: int,
) -> tuple[list[StoredCompletion], bool]:
    """Returns a page of the project's stored completions, and whether more follow.

    A page has fewer rows than `limit` if more would exceed `most_bytes`, but at least one. Raises
    UnknownCursor.
    """
    place = None
    if after is not None:
        cursor = find_completion(session, project_id, after)
        if cursor is None:
            raise UnknownCursor(after)
        place = (cursor.created_at, cursor.id)
    return _page(session, project_id, wanted, place, limit=limit, order=order, most=most_bytes)


def page_before(
    session: Session,
    project_id: str,
    wanted: CompletionFilter,
    *,
    before: Place | None,
    limit: int,
    most_bytes: int,
) -> list[StoredCompletion]:
    """Returns the newest stored completions, or the newest before a place that may be deleted.

    The list is shorter than `limit` if more would exceed `most_bytes`. It is empty at the end.
    """
    rows, _ = _page(session, project_id, wanted, before, limit=limit, order="desc", most=most_bytes)
    return rows


def has_any(session: Session, project_id: str, wanted: CompletionFilter) -> bool:
    """Returns whether the project has a stored completion that the filter selects."""
    query = select(StoredCompletion.id).where(*wanted.conditions(project_id)).limit(1)
    return session.scalar(query) is not None


def set_metadata(
    session: Session, project_id: str, completion_id: str, metadata: Mapping[str, str]
) -> StoredCompletion | None:
    """Replaces the metadata of a stored completion and returns it, or None if it does not exist."""
    change = update(StoredCompletion).where(*_is(project_id, completion_id))
    change = change.values(completion_metadata=dict(metadata))
    return session.scalars(
        change.returning(StoredCompletion),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one_or_none()


def delete_completions(session: Session, project_id: str, ids: Collection[str]) -> int:
    """Deletes stored completions of a project and returns how many there were."""
    gone = delete(StoredCompletion).where(
        StoredCompletion.project_id == project_id, StoredCompletion.id.in_(ids)
    )
    sizes = session.scalars(gone.returning(StoredCompletion.bytes)).all()
    if sizes:
        _add_usage(session, project_id, -len(sizes), -sum(sizes))
    return len(sizes)


def _page(
    session: Session,
    project_id: str,
    wanted: CompletionFilter,
    place: Place | None,
    *,
    limit: int,
    order: Order,
    most: int,
) -> tuple[list[StoredCompletion], bool]:
    """Returns rows after a place up to `most` bytes, at least one, and whether more follow."""
    columns = select(StoredCompletion.id, StoredCompletion.bytes)
    query = _ordered(columns.where(*wanted.conditions(project_id)), place, order)
    candidates = session.execute(query.limit(limit + 1)).all()
    ids: list[str] = []
    num_bytes = 0
    for completion_id, size in candidates[:limit]:
        num_bytes += size
        if ids and num_bytes > most:
            break
        ids.append(completion_id)
    chosen = _ordered(select(StoredCompletion).where(StoredCompletion.id.in_(ids)), None, order)
    return list(session.scalars(chosen)), len(candidates) > len(ids)


def _is(project_id: str, completion_id: str) -> tuple[ColumnElement[bool], ...]:
    return (StoredCompletion.id == completion_id, StoredCompletion.project_id == project_id)


def _ordered(query: Select[*Columns], place: Place | None, order: Order) -> Select[*Columns]:
    key = tuple_(StoredCompletion.created_at, StoredCompletion.id)
    if place is not None:
        query = query.where(key > place if order == "asc" else key < place)
    columns = (StoredCompletion.created_at, StoredCompletion.id)
    return query.order_by(*(columns if order == "asc" else (c.desc() for c in columns)))


def _add_usage(session: Session, project_id: str, num_completions: int, num_bytes: int) -> None:
    values = {"project_id": project_id, "num_completions": num_completions, "bytes": num_bytes}
    fresh = insert(StoredUsage).values(values)
    totals = {
        "num_completions": StoredUsage.num_completions + fresh.excluded.num_completions,
        "bytes": StoredUsage.bytes + fresh.excluded.bytes,
    }
    session.execute(fresh.on_conflict_do_update(index_elements=["project_id"], set_=totals))


def _set_mark(session: Session, segment_id: str, num_loaded: int) -> None:
    mark = update(SpoolMark).where(SpoolMark.id == segment_id)
    session.execute(mark.values(num_loaded=func.greatest(SpoolMark.num_loaded, num_loaded)))
