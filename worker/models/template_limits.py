"""Limits the CPU time and memory of an untrusted chat template that renders in this process."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

CPU_SECONDS, MEMORY_BYTES = 10.0, 2**29
STATM = Path("/proc/self/statm")


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TimeoutError or MemoryError inside the block if it exceeds the limits.

    Only the main thread on Linux can set a CPU timer. In other threads, and on other systems,
    nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread() or not STATM.exists():
        yield
        return

    def give_up(_: int, __: FrameType | None) -> NoReturn:
        """Signal handler that ends the block."""
        raise TimeoutError("it takes too long")

    previous = signal.signal(signal.SIGVTALRM, give_up)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(STATM.read_text().split()[0]) * resource.getpagesize()
    # The new limit must not exceed the limits that the process already has.
    most = min(each for each in (used + MEMORY_BYTES, *limits) if each != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    # CPU time, not wall-clock time: a suspended or overloaded machine must not fail the template.
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, previous)
