"""Waiting for something that another thread or process does."""

import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

# Tests give the time that is needed on an idle machine, with some reserve. A suite shares two cores
# with other programs, and a test must not fail because they are slow.
PATIENCE: Final = 4


def wait_for(
    is_so: Callable[[], T], seconds: float = 20, why: str = "it did not happen in time"
) -> T:
    """Returns the first true value of `is_so`; fails with the reason after `PATIENCE * seconds`."""
    deadline = time.monotonic() + PATIENCE * seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, why
        time.sleep(0.02)
    return found
