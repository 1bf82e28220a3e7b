"""What a request takes from the rate limits of its key and its project."""

import pytest

from app.auth import Principal
from app.db.usage.limits import Limits
from app.errors import BadRequest
from app.services.limits.rate_limits import buckets_of

CALLER = Principal(
    "p", "k", frozenset(), Limits(tokens_per_minute=300), Limits(tokens_per_minute=200)
)


def test_a_request_without_max_tokens_takes_at_most_the_tightest_limit() -> None:
    costs = [bucket.cost for bucket in buckets_of(CALLER, num_tokens=500, least_tokens=20)]
    assert costs == [200, 200]


def test_a_request_that_needs_more_than_a_limit_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"may use 250 tokens .* limited to 200 tokens"):
        buckets_of(CALLER, num_tokens=500, least_tokens=250)
