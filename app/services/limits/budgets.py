"""Budgets: how many tokens a key or a project may use on a day and in a month (UTC)."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, time, timedelta
from typing import Final

from app.db import keys
from app.db.session import transaction
from app.db.usage.limits import UNLIMITED, Limits
from app.db.usage.limits import project_limits as read_project_limits
from app.db.usage.records import PERIODS, OwnerKind, Period, used_tokens
from app.errors import QuotaExceeded
from app.services.usage.recorder import UsageRecorder

KINDS: Final[tuple[OwnerKind, ...]] = ("key", "project")
NUM_READS: Final = 3  # attempts at a read that no write of this process interrupts


def demand_budget(
    project_id: str,
    key_id: str | None,
    *,
    limits: Limits,
    project_limits: Limits,
    recorder: UsageRecorder | None = None,
) -> None:
    """Raises QuotaExceeded if a budget of the key or of its project is used up.

    A request is admitted while anything is left of each budget. The last requests may therefore
    exceed it.

    recorder: Its tokens that are not in the database yet count, too.
    """
    if not (limits.has_budget or project_limits.has_budget):
        return
    now = datetime.now(UTC)
    used = read_used_tokens(project_id, key_id or "", now, recorder)
    owners: tuple[tuple[OwnerKind, str, Limits], ...] = (
        ("key", f"API key {key_id}", limits),
        ("project", f"project {project_id}", project_limits),
    )
    for kind, owner, owner_limits in owners:
        budgets: tuple[tuple[Period, int | None], ...] = (
            ("month", owner_limits.monthly_tokens),
            ("day", owner_limits.daily_tokens),
        )
        for period, budget in budgets:
            num_tokens = used.get((kind, period), 0)
            if budget is not None and num_tokens >= budget:
                raise _exceeded(owner, period, budget, num_tokens, now)


def demand_batch_budget(project_id: str, key_id: str | None) -> None:
    """Raises QuotaExceeded if a budget of a batch's key or project is used up."""
    facts = None if key_id is None else keys.read_key(key_id)
    if facts is not None:
        limits, shared = facts.limits, facts.project_limits
    else:
        with transaction() as session:
            limits, shared = UNLIMITED, read_project_limits(session, project_id)
    demand_budget(project_id, key_id, limits=limits, project_limits=shared)


def read_used_tokens(
    project_id: str, key_id: str, now: datetime, recorder: UsageRecorder | None
) -> Mapping[tuple[OwnerKind, Period], int]:
    """Returns the tokens used in the current periods, with those that are only in the recorder.

    A write that ends during the read may be missed, so the read is then repeated, a few times at
    most. Each token counts at most once.
    """
    used: dict[tuple[OwnerKind, Period], int] = {}
    for _ in range(NUM_READS):
        num_written = recorder.num_written if recorder else 0
        with transaction() as session:
            used, number = used_tokens(
                session,
                key_id=key_id,
                project_id=project_id,
                now=now,
                writer_id=recorder.id if recorder else None,
            )
        if recorder is None:
            break
        for kind in KINDS:
            for period in PERIODS:
                num_tokens = recorder.unwritten_tokens(
                    project_id, key_id, kind, period, now, after=number
                )
                used[kind, period] = used.get((kind, period), 0) + num_tokens
        if recorder.num_written == num_written:
            break
    return used


def period_end(now: datetime, period: Period) -> datetime:
    """Returns the time at which the current day or month ends, in UTC."""
    day = now.astimezone(UTC).date()
    next_day = day + timedelta(days=1)
    if period == "month":
        next_day = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
    return datetime.combine(next_day, time(), UTC)


def _exceeded(
    owner: str, period: Period, budget: int, num_tokens: int, now: datetime
) -> QuotaExceeded:
    end = period_end(now, period)
    error = QuotaExceeded(
        f"the {owner} has used {num_tokens} of its budget of {budget} tokens per {period}; requests are refused "
        f"until {end:%Y-%m-%dT%H:%M:%SZ}, or until the operator raises the budget"
    )
    error.retry_after_seconds = max(1, math.ceil((end - now).total_seconds()))
    return error
