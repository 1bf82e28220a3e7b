"""Rate limits of a caller: their buckets, the headers that show them, and the errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from app.auth import Principal
from app.errors import BadRequest, TooManyRequests
from app.services.limits.rate_limiter import Bucket, Taken

Unit = Literal["requests", "tokens"]
UNITS: Final[tuple[Unit, ...]] = ("requests", "tokens")
SHORT: Final = {"requests": "RPM", "tokens": "TPM"}


@dataclass(frozen=True)
class LimitedBucket(Bucket):
    """Bucket of a limit, with its owner (an API key or a project) and its unit."""

    owner: str
    unit: Unit


def buckets_of(caller: Principal, *, num_tokens: int, least_tokens: int) -> list[LimitedBucket]:
    """Returns the buckets of a request that may use this many tokens. Unlimited ones are left out.

    least_tokens: If the tightest limit is below `num_tokens`, the request takes all of it, but not
        fewer tokens than these.

    Raises BadRequest if the request can never be admitted.
    """
    owners = (
        ("key", caller.key_id, f"API key {caller.key_id}", caller.limits),
        ("project", caller.project_id, f"project {caller.project_id}", caller.project_limits),
    )
    token_limits = [caller.limits.tokens_per_minute, caller.project_limits.tokens_per_minute]
    tightest = min((limit for limit in token_limits if limit is not None), default=num_tokens)
    num_tokens = max(least_tokens, min(num_tokens, tightest))
    buckets = []
    for kind, owner_id, owner, limits in owners:
        for unit in UNITS:
            limit = limits.requests_per_minute if unit == "requests" else limits.tokens_per_minute
            if limit is not None:
                # The braces keep all keys of a project on one node of a Valkey cluster.
                key = f"stillhouse:limit:{{{caller.project_id}}}:{kind}:{owner_id}:{unit}"
                cost = 1 if unit == "requests" else num_tokens
                buckets.append(LimitedBucket(key, limit, cost, owner, unit))
    for bucket in buckets:
        if bucket.cost > bucket.limit:
            raise BadRequest(
                f"the request may use {bucket.cost} tokens (an estimate of the prompt, and max_tokens for "
                f"each choice), but the {bucket.owner} is limited to {bucket.limit} tokens per minute; "
                "reduce max_tokens, n or the prompt",
                "request_too_large",
                "max_tokens",
            )
    return buckets


def rate_limit_headers(buckets: Sequence[LimitedBucket], taken: Taken) -> dict[str, str]:
    """Returns the `x-ratelimit-*` headers. Of two limits with one unit, the tighter is shown."""
    headers = {}
    for unit in UNITS:
        shown = [
            (state.remaining, -state.reset_seconds, bucket.limit)
            for bucket, state in zip(buckets, taken.states, strict=True)
            if bucket.unit == unit
        ]
        if shown:
            remaining, reset_seconds, limit = min(shown)
            headers[f"x-ratelimit-limit-{unit}"] = str(limit)
            headers[f"x-ratelimit-remaining-{unit}"] = str(remaining)
            headers[f"x-ratelimit-reset-{unit}"] = duration(-reset_seconds)
    return headers


def refusal(buckets: Sequence[LimitedBucket], taken: Taken) -> TooManyRequests:
    """Returns the error for a request that has to wait."""
    assert taken.blocked is not None, "the request was admitted"
    bucket, state = buckets[taken.blocked], taken.states[taken.blocked]
    error = TooManyRequests(
        f"Rate limit reached for {bucket.owner} on {bucket.unit} per minute ({SHORT[bucket.unit]}): "
        f"Limit {bucket.limit}, Used {bucket.limit - state.remaining}, Requested {bucket.cost}. "
        f"Please try again in {duration(taken.wait_seconds)}."
    )
    error.retry_after_seconds = max(1, math.ceil(taken.wait_seconds))
    error.retry_after_milliseconds = max(1, math.ceil(taken.wait_seconds * 1000))
    return error


def duration(seconds: float) -> str:
    """Returns a duration as OpenAI writes it, rounded up: `12ms`, `1.5s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    hours_text = f"{hours}h" if hours else ""
    minutes_text = f"{minutes}m" if hours or minutes else ""
    return f"{hours_text}{minutes_text}{rest / 1000:g}s"
