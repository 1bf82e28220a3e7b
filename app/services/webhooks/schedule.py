"""Schedule of the attempts of a delivery: ten attempts in a little more than a day."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

# Attempts are made at 0 s, 5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h and 24 h, plus jitter.
RETRY_DELAYS_SECONDS: Final = (5, 295, 1500, 5400, 10_800, 18_000, 14_400, 21_600, 14_400)
JITTER: Final = 0.1  # of the delay. It is never negative: the last attempt is after a full day.
MAX_RETRY_AFTER_SECONDS: Final = 6 * 3600.0
SLOW_DOWN_STATUSES: Final = frozenset({429, 502, 503, 504})


def delay_seconds(
    num_failures: int, *, random: float, retry_after_seconds: float | None = None
) -> float | None:
    """Returns the delay before the next attempt, or None if there is none.

    num_failures: Number of attempts that have failed, at least 1.
    random: Random number between 0 and 1, for the jitter.
    retry_after_seconds: Delay that the receiver has requested. A shorter one has no effect.
    """
    if num_failures > len(RETRY_DELAYS_SECONDS):
        return None
    delay = RETRY_DELAYS_SECONDS[num_failures - 1] * (1 + JITTER * random)
    return max(delay, min(retry_after_seconds or 0.0, MAX_RETRY_AFTER_SECONDS))


def retry_after_of(status_code: int, header: str | None, now: datetime) -> float | None:
    """Returns the delay that a response requests, in seconds, or None.

    `header` is Retry-After: a number of seconds or an HTTP date.
    """
    if header is None or status_code not in SLOW_DOWN_STATUSES:
        return None
    header = header.strip()
    if header.isascii() and header.isdecimal():
        return float(header[:9])
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, OverflowError):  # OverflowError: a year or a time zone of many digits
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())
