"""Time of a run by phase."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.contracts.job_seconds import Phase


class PhaseTimes:
    """Measures how long each phase of a run takes. A phase inside another one pauses it.

    The phase `start` begins with this object, or `before_seconds` earlier, and covers all time that
    belongs to no other phase.
    """

    def __init__(
        self, *, before_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._seconds: dict[Phase, float] = {}
        self._phases: list[Phase] = ["start"]
        self._since = clock() - before_seconds

    @property
    def seconds(self) -> dict[Phase, float]:
        """Seconds of each phase so far."""
        self._count()
        return dict(self._seconds)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the time of the block for a phase."""
        self._count()
        self._phases.append(name)
        try:
            yield
        finally:
            self._count()
            self._phases.pop()

    def _count(self) -> None:
        now = self._clock()
        phase = self._phases[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now


def process_seconds() -> float:
    """Returns the age of this process, or 0 if the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError):
        return 0.0
