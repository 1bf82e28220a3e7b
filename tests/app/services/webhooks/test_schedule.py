"""When a delivery is attempted again."""

from datetime import UTC, datetime

import pytest

from app.services.webhooks.schedule import delay_seconds, retry_after_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_ten_attempts_take_at_least_a_full_day() -> None:
    for random in (0.0, 1.0):
        delays: list[float] = []
        while (delay := delay_seconds(len(delays) + 1, random=random)) is not None:
            delays.append(delay)
        assert len(delays) == 9
        assert 86_400 <= sum(delays) <= 1.1 * 86_400
    assert delay_seconds(1, random=0.0) == 5


def test_a_requested_delay_counts_if_it_is_longer_but_not_without_bound() -> None:
    assert delay_seconds(1, random=0.0, retry_after_seconds=60) == 60
    assert delay_seconds(3, random=0.0, retry_after_seconds=60) == 1500
    assert delay_seconds(1, random=0.0, retry_after_seconds=1e9) == 6 * 3600
    assert delay_seconds(10, random=0.0, retry_after_seconds=60) is None


@pytest.mark.parametrize(
    ("status", "header", "seconds"),
    [
        (429, "17", 17),
        (503, " 17 ", 17),
        (503, "Thu, 01 Jan 2026 00:01:00 GMT", 60),
        (503, "Wed, 31 Dec 2025 00:01:00 GMT", 0),
        (503, "9" * 400, 999_999_999),
        (503, "-5", None),
        (503, "soon", None),
        (503, f"01 Jan {'9' * 50} 00:00:00 GMT", None),
        (503, f"01 Jan 2026 00:00:00 +{'9' * 50}", None),
        (503, "²", None),
        (503, None, None),
        (500, "17", None),
    ],
)
def test_retry_after_is_read_from_answers_that_ask_for_less(
    status: int, header: str | None, seconds: float | None
) -> None:
    assert retry_after_of(status, header, NOW) == seconds
