"""Guards workers against lost messages and silent queue consumers.

Wake-up messages may be lost, and a Celery consumer may stop after a restart of the broker.
"""

import threading
import time
from collections.abc import Callable
from typing import Self

import structlog

log = structlog.get_logger(__name__)

SILENCE_SECONDS = 20.0  # kombu itself detects a half-open connection in less time
NUM_CHECKS = 8  # checks of the queue within the silence limit


class WorkLoop:
    """Calls `work` for each wake-up message, and periodically without one; never twice at once.

    `work` runs all due jobs and returns their number. Use it as a context manager: leaving the
    block ends the periodic thread, and waits for work that is in progress there.
    """

    def __init__(self, work: Callable[[], int], *, every_seconds: float) -> None:
        self._work = work
        self._every_seconds = every_seconds
        self._busy = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="work_loop")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def wake_up(self) -> None:
        """Handles a wake-up message: waits for work in progress, then calls `work`."""
        with self._busy:
            self._work()

    def _poll(self) -> None:
        while not self._is_over.wait(self._every_seconds):
            if not self._busy.acquire(blocking=False):
                continue
            try:
                num_jobs = self._work()
            except Exception:
                log.exception("poll_failed")  # the thread must survive any error
                continue
            finally:
                self._busy.release()
            if num_jobs:
                log.info("job_found_without_message", num_jobs=num_jobs)


class Inbox:
    """Watches a queue that only this process reads, and detects that the consumer has stopped.

    The consumer has stopped if the oldest message stays the same for `silence_seconds`. `oldest`
    returns that message, or None if the queue is empty. It raises one of `faults` if the broker is
    unavailable, which does not count as silence. `on_silence` is called once, from a thread of
    this object.
    """

    def __init__(
        self,
        oldest: Callable[[], object],
        on_silence: Callable[[], None],
        *,
        faults: tuple[type[Exception], ...],
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._oldest, self._on_silence = oldest, on_silence
        self._faults = faults
        self._silence_seconds = silence_seconds

    def start(self) -> None:
        threading.Thread(target=self._watch, name="inbox", daemon=True).start()

    def _watch(self) -> None:
        known, since = None, time.monotonic()
        while known is None or time.monotonic() - since < self._silence_seconds:
            time.sleep(self._silence_seconds / NUM_CHECKS)
            try:
                found = self._oldest()
            except self._faults:
                found = None
            if found != known:
                known, since = found, time.monotonic()
        log.error("consumer_silent", seconds=self._silence_seconds)
        self._on_silence()
