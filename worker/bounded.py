"""Limits on what a stranger's chat template may take while it renders in this process."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

CPU_SECONDS, MEMORY_BYTES = 10.0, 2**29


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TimeoutError or MemoryError inside the block. Time can only be limited on the main thread: elsewhere nothing is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(_: int, __: FrameType | None) -> NoReturn:
        raise TimeoutError("it does not end")

    previous = signal.signal(signal.SIGVTALRM, give_up)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, limits[1]))
    signal.setitimer(
        signal.ITIMER_VIRTUAL, CPU_SECONDS
    )  # a machine that stands still is not the template's fault
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, previous)
