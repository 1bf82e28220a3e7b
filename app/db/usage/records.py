"""Adds usage to the tables, and reads how much of a budget is used.

Rows are always written in the same order, so that two writers cannot deadlock.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import case, delete, func, or_, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.schema.usage_tables import TokenTotal, TokenUsage, UsageWriter

Period = Literal["day", "month"]
OwnerKind = Literal["key", "project"]
KEY: Final = ("minute", "project_id", "key_id", "model", "is_batch")
PERIODS: Final[tuple[Period, ...]] = ("day", "month")
COUNTS: Final = ("num_requests", "input_tokens", "cached_tokens", "output_tokens")


@dataclass(frozen=True)
class Usage:
    """Model and number of tokens of one answer. `input_tokens` includes `cached_tokens`."""

    model: str
    input_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class UsageKey(NamedTuple):
    """Key of a row of `TokenUsage`."""

    minute: datetime
    project_id: str
    key_id: str
    model: str
    is_batch: bool


@dataclass
class UsageCounts:
    """Sums of a row of `TokenUsage`."""

    num_requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def add(self, usage: Usage) -> None:
        self.num_requests += 1
        self.input_tokens += usage.input_tokens
        self.cached_tokens += usage.cached_tokens
        self.output_tokens += usage.output_tokens

    @property
    def num_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class Total(NamedTuple):
    """Key of a sum of tokens: one budget of a key or a project."""

    owner_kind: OwnerKind
    owner_id: str
    period: Period


def this_minute() -> datetime:
    """Returns the time at which the current minute began."""
    return datetime.now(UTC).replace(second=0, microsecond=0)


def began_on(time: datetime, period: Period) -> date:
    """Returns the first day of the period that a time is in, in UTC."""
    day = time.astimezone(UTC).date()
    return day if period == "day" else day.replace(day=1)


def add_usage(session: Session, rows: Iterable[tuple[UsageKey, UsageCounts]]) -> None:
    """Adds sums to the rows of usage, and to the totals that budgets are compared with."""
    ordered = sorted(rows, key=lambda row: row[0])
    if not ordered:
        return
    values = [{**key._asdict(), **vars(counts)} for key, counts in ordered]
    fresh = insert(TokenUsage)
    sums: dict[Any, Any] = {  # Any: columns and SQL expressions
        name: getattr(TokenUsage, name) + fresh.excluded[name] for name in COUNTS
    }
    session.execute(fresh.on_conflict_do_update(index_elements=KEY, set_=sums), values)
    _add_totals(session, ordered)


def _add_totals(session: Session, rows: Iterable[tuple[UsageKey, UsageCounts]]) -> None:
    totals: Counter[tuple[Total, date]] = Counter()
    for key, counts in rows:
        for period in PERIODS:
            day = began_on(key.minute, period)
            if key.key_id:
                totals[Total("key", key.key_id, period), day] += counts.num_tokens
            totals[Total("project", key.project_id, period), day] += counts.num_tokens
    values = [
        {**total._asdict(), "began_on": day, "tokens": tokens}
        for (total, day), tokens in sorted(totals.items())
    ]
    fresh = insert(TokenTotal)
    new = fresh.excluded
    # Tokens of a period that is over, written late after an outage, no longer count.
    tokens = case(
        (new.began_on > TokenTotal.began_on, new.tokens),
        (new.began_on == TokenTotal.began_on, TokenTotal.tokens + new.tokens),
        else_=TokenTotal.tokens,
    )
    latest = func.greatest(TokenTotal.began_on, new.began_on)
    session.execute(
        fresh.on_conflict_do_update(
            index_elements=Total._fields, set_={"tokens": tokens, "began_on": latest}
        ),
        values,
    )


def add_batch_answer(session: Session, project_id: str, key_id: str | None, usage: Usage) -> None:
    """Adds the usage of one answer of a batch."""
    counts = UsageCounts()
    counts.add(usage)
    key = UsageKey(this_minute(), project_id, key_id or "", usage.model, is_batch=True)
    add_usage(session, [(key, counts)])


def begin_write(session: Session, writer_id: str, number: int) -> bool:
    """Records that a writer makes its write with this number. Returns False for a repeated write.

    A write is repeated if its process could not know whether the first one was committed.
    """
    fresh = insert(UsageWriter).values(id=writer_id, num_writes=number)
    upserted = fresh.on_conflict_do_update(
        index_elements=["id"],
        set_={"num_writes": number, "written_at": func.now()},
        where=UsageWriter.num_writes < number,
    )
    return session.scalar(upserted.returning(UsageWriter.id)) is not None


def forget_writers(session: Session, writer_id: str | None = None) -> None:
    """Deletes a writer that has ended, or those that have written nothing for a day."""
    old = UsageWriter.written_at < func.now() - text("interval '1 day'")
    is_over = old if writer_id is None else UsageWriter.id == writer_id
    session.execute(delete(UsageWriter).where(is_over))


def used_tokens(
    session: Session, *, key_id: str, project_id: str, now: datetime, writer_id: str | None = None
) -> tuple[dict[tuple[OwnerKind, Period], int], int]:
    """Returns the tokens that a key and its project have used on this day and in this month.

    Also returns the number of the last write of a writer that these tokens include. It is 0 if
    there are no tokens, or no such writer.
    """
    # One statement, so that the tokens and the number are those of one time.
    number = select(UsageWriter.num_writes).where(UsageWriter.id == writer_id).scalar_subquery()
    query = select(TokenTotal, func.coalesce(number, 0)).where(
        or_(
            (TokenTotal.owner_kind == "key") & (TokenTotal.owner_id == key_id),
            (TokenTotal.owner_kind == "project") & (TokenTotal.owner_id == project_id),
        )
    )
    found: dict[tuple[OwnerKind, Period], int] = {}
    num_writes = 0
    for row, num_writes in session.execute(query):  # noqa: B007  # the same number in each row
        total = Total._make((row.owner_kind, row.owner_id, row.period))
        if row.began_on == began_on(now, total.period):
            found[total.owner_kind, total.period] = row.tokens
    return found, num_writes
