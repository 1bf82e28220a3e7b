"""Reports usage in buckets of time, as OpenAI's route for the usage of completions does."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from app.db.session import transaction
from app.db.usage.report import GROUPS, Interval, UsageFilter, UsageSum, sum_usage
from app.errors import BadRequest
from app.schemas.organization.usage import CompletionsUsage, UsageBucket, UsagePage

BucketWidth = Literal["1m", "1h", "1d"]


@dataclass(frozen=True)
class Width:
    """Width of a bucket, and how many buckets a page has by default and at most."""

    seconds: int
    default_limit: int
    max_limit: int


WIDTHS: Final[Mapping[str, Width]] = {
    "1m": Width(60, 60, 1440),
    "1h": Width(3600, 24, 168),
    "1d": Width(86_400, 7, 31),
}
# Groups of OpenAI that have one value here.
CONSTANT_GROUPS: Final[Mapping[str, str | None]] = {
    "user_id": None,
    "service_tier": "default",
    "api_source": "unlabeled",
}
CURSOR: Final = re.compile(r"page_(\d{1,10})")


@dataclass(frozen=True)
class UsageQuery:
    """Parameters of a report. Times are in seconds since the epoch.

    end_time: None: now.
    page: `next_page` of the page before.
    """

    start_time: int
    end_time: int | None = None
    bucket_width: BucketWidth = "1d"
    limit: int | None = None
    page: str | None = None
    group_by: Sequence[str] = ()
    wanted: UsageFilter = field(default_factory=UsageFilter)


def report_usage(query: UsageQuery) -> UsagePage:
    """Returns a page of buckets, also of those without usage. Raises BadRequest."""
    width = WIDTHS[query.bucket_width]
    limit = width.default_limit if query.limit is None else query.limit
    if not 1 <= limit <= width.max_limit:
        message = f"limit must be between 1 and {width.max_limit} for bucket_width={query.bucket_width}, it is {limit}"
        raise BadRequest(message, param="limit")
    unknown = [name for name in query.group_by if name not in {*GROUPS, *CONSTANT_GROUPS}]
    if unknown:
        known = ", ".join([*GROUPS, *CONSTANT_GROUPS])
        message = f"unknown group: {unknown[0][:64]}; choose from {known}"
        raise BadRequest(message, param="group_by")
    end_time = int(time.time()) + 1 if query.end_time is None else query.end_time
    if end_time <= query.start_time:
        message = "end_time must be after start_time, which must be in the past without end_time"
        raise BadRequest(message, param="start_time" if query.end_time is None else "end_time")
    first = _first_bucket(query, width, end_time)
    last = min(first + limit * width.seconds, end_time)
    # Usage is kept per minute.
    start = max(first, query.start_time - query.start_time % 60)
    group_by = [name for name in GROUPS if name in query.group_by]
    with transaction() as session:
        sums = sum_usage(
            session,
            Interval(datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(last, UTC)),
            timedelta(seconds=width.seconds),
            wanted=query.wanted,
            group_by=group_by,
        )
    results: dict[int, list[CompletionsUsage]] = {}
    for row in sums:
        results.setdefault(int(row.began_at.timestamp()), []).append(_result(row, query.group_by))
    starts = range(first, last, width.seconds)
    data = [
        UsageBucket(
            start_time=start, end_time=start + width.seconds, results=results.get(start, [])
        )
        for start in starts
    ]
    has_more = last < end_time
    return UsagePage(data=data, has_more=has_more, next_page=f"page_{last}" if has_more else None)


def _first_bucket(query: UsageQuery, width: Width, end_time: int) -> int:
    """Returns the start of the first bucket of the page. Buckets are aligned in UTC."""
    earliest = query.start_time - query.start_time % width.seconds
    if query.page is None:
        return earliest
    match = CURSOR.fullmatch(query.page)
    first = int(match[1]) if match else -1
    if first % width.seconds or not earliest <= first < end_time:
        message = "page must be the next_page of a request with the same parameters"
        raise BadRequest(message, param="page")
    return first


def _result(row: UsageSum, group_by: Sequence[str]) -> CompletionsUsage:
    group = {name: None if value == "" else value for name, value in row.group.items()}
    constants = {name: value for name, value in CONSTANT_GROUPS.items() if name in group_by}
    return CompletionsUsage.model_validate(
        {
            "input_tokens": row.input_tokens,
            "output_tokens": row.output_tokens,
            "num_model_requests": row.num_requests,
            "input_cached_tokens": row.cached_tokens,
            "input_uncached_tokens": row.input_tokens - row.cached_tokens,
            **group,
            **constants,
        }
    )
