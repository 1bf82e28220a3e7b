"""Meter of one generation request: its limits before it begins, and its usage after it has ended."""

from fastapi.concurrency import run_in_threadpool

from app.auth import Principal
from app.db.usage.records import Usage
from app.services.limits.budgets import demand_budget
from app.services.limits.rate_limiter import RateLimiter, Taken
from app.services.limits.rate_limits import (
    LimitedBucket,
    buckets_of,
    rate_limit_headers,
    refusal,
)
from app.services.usage.recorder import UsageRecorder


class Meter:
    """Counts one request against the limits of its key and project, and records its usage.

    A caller without limits costs nothing: no query and no message to Valkey.

    headers: The `x-ratelimit-*` headers of the response. They are filled in by `reserve`.
    """

    def __init__(self, limiter: RateLimiter, recorder: UsageRecorder, caller: Principal) -> None:
        self.headers: dict[str, str] = {}
        self._limiter = limiter
        self._recorder = recorder
        self._caller = caller
        self._buckets: list[LimitedBucket] = []
        self._taken: Taken | None = None
        self._is_settled = False

    async def reserve(self, num_tokens: int, *, least_tokens: int) -> None:
        """Takes one request and these tokens from the rate limits.

        If a limit is smaller than that, takes the whole of the smallest one, but not fewer than
        `least_tokens`.

        Raises:
            BadRequest: A rate limit is smaller than the request.
            QuotaExceeded: A budget is used up.
            TooManyRequests: A rate limit is reached.
            Unavailable: Valkey cannot be reached.
        """
        caller = self._caller
        if caller.limits.has_budget or caller.project_limits.has_budget:
            await run_in_threadpool(self._demand_budget)
        self._buckets = buckets_of(caller, num_tokens=num_tokens, least_tokens=least_tokens)
        if not self._buckets:
            return
        taken = await self._limiter.take(self._buckets)
        self.headers.update(rate_limit_headers(self._buckets, taken))
        if taken.blocked is not None:
            raise refusal(self._buckets, taken)
        self._taken = taken

    def settle(self, usage: Usage | None) -> None:
        """Gives back the tokens that were not used, and records the usage. Never waits.

        Further calls have no effect.
        """
        if self._is_settled:
            return
        self._is_settled = True
        if usage is not None:
            self._recorder.add(self._caller.project_id, self._caller.key_id, usage)
        if self._taken is not None:
            num_tokens = 0 if usage is None else usage.num_tokens
            used = [num_tokens if bucket.unit == "tokens" else None for bucket in self._buckets]
            self._limiter.settle(self._taken, used)

    def _demand_budget(self) -> None:
        caller = self._caller
        demand_budget(
            caller.project_id,
            caller.key_id,
            limits=caller.limits,
            project_limits=caller.project_limits,
            recorder=self._recorder,
        )
