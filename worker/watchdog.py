"""What a worker does about a queue that has gone silent: messages get lost, and a consumer may stop after a broker's restart."""

import threading
import time
from collections.abc import Callable
from typing import Self

import structlog

log = structlog.get_logger(__name__)

SILENCE_SECONDS = 20.0  # kombu notices a half-open connection within that time by itself
LOOKS = 8  # in that time


class Turns:
    """Works when the doorbell rings, and every so often without it; never twice at once.

    `work` does what is due and gives the number of jobs. The block must end for the thread to: it waits for its turn.
    """

    def __init__(self, work: Callable[[], int], *, every_seconds: float) -> None:
        self._work = work
        self._every_seconds = every_seconds
        self._busy = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="turns")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def wake_up(self) -> None:
        """What the doorbell does: waits for a turn that is under way, and takes one."""
        with self._busy:
            self._work()

    def _look(self) -> None:
        while not self._is_over.wait(self._every_seconds):
            if not self._busy.acquire(blocking=False):
                continue
            try:
                num_jobs = self._work()
            except Exception:
                log.exception("look_failed")  # the thread must outlive any one fault
                continue
            finally:
                self._busy.release()
            if num_jobs:
                log.info("found_without_doorbell", num_jobs=num_jobs)


class Inbox:
    """Watches a queue that only this process reads: its oldest message may not lie there for long.

    `oldest` gives that message, None if there is none, and raises one of `faults` when the broker is away, which is no
    fault of the reader. `on_silence` is called once, from a thread of this object.
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
            time.sleep(self._silence_seconds / LOOKS)
            try:
                found = self._oldest()
            except self._faults:
                found = None
            if found != known:
                known, since = found, time.monotonic()
        log.error("consumer_silent", seconds=self._silence_seconds)
        self._on_silence()
