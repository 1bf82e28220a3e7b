"""Budgets: how many tokens a key or a project may use on a day and in a month (UTC)."""

import math
from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta

from app.db import keys
from app.db.session import transaction
from app.db.usage.limits import Limits
from app.db.usage.records import OwnerKind, Period, used_tokens
from app.errors import QuotaExceeded

UnwrittenTokens = Callable[[OwnerKind, Period, datetime], int]


def demand_budget(
    project_id: str,
    key_id: str,
    *,
    limits: Limits,
    project_limits: Limits,
    unwritten: UnwrittenTokens | None = None,
) -> None:
    """Raises QuotaExceeded if a budget of the key or of its project is used up.

    A request is admitted while anything is left of each budget. The last requests may therefore
    exceed it.

    unwritten: Returns tokens that this process has not written to the database yet.
    """
    if not (limits.has_budget or project_limits.has_budget):
        return
    now = datetime.now(UTC)
    with transaction() as session:
        used = used_tokens(session, key_id=key_id, project_id=project_id, now=now)
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
            num_tokens += 0 if unwritten is None else unwritten(kind, period, now)
            if budget is not None and num_tokens >= budget:
                raise _exceeded(owner, period, budget, num_tokens, now)


def demand_batch_budget(project_id: str, key_id: str | None) -> None:
    """Raises QuotaExceeded if a budget of a batch's key or project is used up."""
    facts = None if key_id is None else keys.read_key(key_id)
    if facts is not None and key_id is not None:
        demand_budget(project_id, key_id, limits=facts.limits, project_limits=facts.project_limits)


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
