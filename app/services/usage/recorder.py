"""Records the usage of generation requests, without delaying their answers.

Finished requests are added up in memory, and a thread writes the sums to Postgres every second. A
kill of the process loses at most what was not written yet. During an outage of Postgres the sums
wait in memory.
"""

import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Final
from uuid import uuid4

import structlog

from app.db.session import DatabaseUnavailable, PoolExhausted, transaction
from app.db.usage import records
from app.db.usage.records import OwnerKind, Period, Usage, UsageCounts, UsageKey

log = structlog.get_logger(__name__)

WRITE_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 0.2  # between two attempts at shutdown
STOP_SECONDS: Final = 10.0  # longest wait at shutdown for the database
NO_DATABASE: Final = (DatabaseUnavailable, PoolExhausted)


class UsageRecorder:
    """Sums of the usage that one API process has not written yet, and the thread that writes them.

    Each write has a number, which Postgres remembers in the same transaction. So a write whose
    commit may have been lost is repeated with its number, and is added once.
    """

    def __init__(self) -> None:
        self.id = uuid4().hex
        self.num_written = 0  # number of the last write that Postgres has confirmed
        self._num_writes = 0
        self._fresh: dict[UsageKey, UsageCounts] = {}
        self._writing: dict[UsageKey, UsageCounts] = {}
        self._guard = threading.Lock()  # held only briefly, since the event loop takes it
        self._write_lock = threading.Lock()  # held during a write
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Writes everything. Gives up after 10 seconds if the database does not answer."""
        self._is_stopping.set()
        self._thread.join(STOP_SECONDS)
        with self._guard:
            num_lost = sum(counts.num_tokens for rows in self._rows() for counts in rows.values())
        if num_lost:
            log.error("usage_lost", num_tokens=num_lost)

    def add(self, project_id: str, key_id: str, usage: Usage) -> None:
        """Adds the usage of a request that has ended. Never waits for the database."""
        key = UsageKey(records.this_minute(), project_id, key_id, usage.model, is_batch=False)
        with self._guard:
            self._fresh.setdefault(key, UsageCounts()).add(usage)

    def write(self) -> None:
        """Writes all sums. Raises DatabaseUnavailable or PoolExhausted; the sums then remain."""
        with self._write_lock:
            with self._guard:
                if not self._writing and self._fresh:
                    self._writing, self._fresh = self._fresh, {}
                    self._num_writes += 1
            if not self._writing:
                return
            with transaction() as session:
                if records.begin_write(session, self.id, self._num_writes):
                    records.add_usage(session, self._writing.items())
            with self._guard:
                self._writing = {}
                self.num_written = self._num_writes

    def unwritten_tokens(
        self,
        project_id: str,
        key_id: str,
        kind: OwnerKind,
        period: Period,
        now: datetime,
        *,
        after: int = 0,
    ) -> int:
        """Returns the unwritten tokens of a key or a project in the period that contains `now`.

        after: Number of the last write that was found in the database. A write in progress with
            this number is left out, since its commit has just not been confirmed yet.
        """
        first_day = records.began_on(now, period)
        with self._guard:
            return sum(
                counts.num_tokens
                for rows in (self._rows() if self._num_writes > after else (self._fresh,))
                for key, counts in rows.items()
                if key.project_id == project_id
                and (kind == "project" or key.key_id == key_id)
                and records.began_on(key.minute, period) == first_day
            )

    def _rows(self) -> tuple[Mapping[UsageKey, UsageCounts], ...]:
        return self._writing, self._fresh

    def _run(self) -> None:
        self._forget_writers(None)
        while not self._is_stopping.wait(WRITE_SECONDS):
            self._has_written_all()
        deadline = time.monotonic() + STOP_SECONDS - 1
        while not self._has_written_all() and time.monotonic() < deadline:
            time.sleep(RETRY_SECONDS)
        if self._num_writes:
            self._forget_writers(self.id)

    def _forget_writers(self, writer_id: str | None) -> None:
        try:
            with transaction() as session:
                records.forget_writers(session, writer_id)
        except Exception as fault:  # noqa: BLE001  # the row is forgotten a day later
            log.warning("usage_writer_not_forgotten", reason=type(fault).__name__)

    def _has_written_all(self) -> bool:
        try:
            self.write()
        except NO_DATABASE as fault:
            log.warning("usage_not_written", reason=type(fault).__name__)
        except Exception:
            log.exception("usage_not_written")  # the thread must keep running
        with self._guard:
            return not any(self._rows())
