"""Adds up usage for reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.db.schema.usage_tables import TokenUsage

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Any: columns of several types
GROUPS: Final[Mapping[str, InstrumentedAttribute[Any]]] = {
    "project_id": TokenUsage.project_id,
    "api_key_id": TokenUsage.key_id,
    "model": TokenUsage.model,
    "batch": TokenUsage.is_batch,
}
SUMS: Final = (
    func.sum(TokenUsage.num_requests),
    func.sum(TokenUsage.input_tokens),
    func.sum(TokenUsage.cached_tokens),
    func.sum(TokenUsage.output_tokens),
)


@dataclass(frozen=True)
class UsageFilter:
    """Selects usage. None selects everything.

    is_batch: True selects the requests of batches, and False all others.
    """

    project_ids: Sequence[str] | None = None
    key_ids: Sequence[str] | None = None
    models: Sequence[str] | None = None
    is_batch: bool | None = None


@dataclass(frozen=True)
class UsageSum:
    """Usage of one group in one bucket. `group` has the values of the columns in `GROUPS`."""

    began_at: datetime
    group: Mapping[str, str | bool]
    num_requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int


class Interval(NamedTuple):
    """Interval of time, without its end."""

    start: datetime
    end: datetime


def sum_usage(
    session: Session,
    interval: Interval,
    width: timedelta,
    *,
    wanted: UsageFilter,
    group_by: Sequence[str],
) -> list[UsageSum]:
    """Returns the sums of all groups in all buckets that have usage, in order.

    width: Of a bucket. Buckets are aligned with midnight in UTC.
    group_by: Names in `GROUPS`.
    """
    began_at = func.date_bin(width, TokenUsage.minute, EPOCH).label("began_at")
    groups = [GROUPS[name] for name in group_by]
    query = select(began_at, *SUMS, *groups).where(
        TokenUsage.minute >= interval.start, TokenUsage.minute < interval.end
    )
    if wanted.project_ids is not None:
        query = query.where(TokenUsage.project_id.in_(wanted.project_ids))
    if wanted.key_ids is not None:
        query = query.where(TokenUsage.key_id.in_(wanted.key_ids))
    if wanted.models is not None:
        query = query.where(TokenUsage.model.in_(wanted.models))
    if wanted.is_batch is not None:
        query = query.where(TokenUsage.is_batch == wanted.is_batch)
    query = query.group_by("began_at", *groups).order_by("began_at", *groups)
    sums = []
    for began, num_requests, num_input, num_cached, num_output, *values in session.execute(query):
        group = dict(zip(group_by, values, strict=True))
        counts = map(int, (num_requests, num_input, num_cached, num_output))
        sums.append(UsageSum(began, group, *counts))
    return sums
