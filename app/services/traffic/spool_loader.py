"""Inserts the records of spools into the database, in batches and each exactly once."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from app.crash_points import crash_point
from app.db.session import DatabaseUnavailable, PoolExhausted, transaction
from app.db.traffic import completions
from app.services.traffic.spool import AbandonedSpool, Segment, Spool

log = structlog.get_logger(__name__)

BATCH_RECORDS: Final = 200
BATCH_BYTES: Final = 4 * 2**20
BATCH_SECONDS: Final = 0.1  # at least this long between two batches, so that they are not tiny
RETRY_SECONDS: Final = 1.0  # after an error of the database
ADOPT_SECONDS: Final = 30.0  # between two searches for spools of processes that have ended
LAST_SECONDS: Final = 8.0  # for the last batches, at shutdown
AWAY = (DatabaseUnavailable, PoolExhausted)


class SpoolLoader:
    """Inserts records of this process's spool, and of spools whose processes have ended.

    `on_dropped` is called with a reason for each record that the database refuses.
    """

    def __init__(self, spool: Spool, on_dropped: Callable[[str], None]) -> None:
        self._spool = spool
        self._on_dropped = on_dropped
        self._has_work = threading.Event()
        self._is_closed = threading.Event()
        self._adopted_at = -ADOPT_SECONDS

    def wake_up(self) -> None:
        self._has_work.set()

    def close(self) -> None:
        """Lets `run` return once the spool is empty, or after LAST_SECONDS."""
        self._is_closed.set()
        self._has_work.set()

    def run(self) -> None:
        """Inserts records until `close` is called. Errors of the database are waited out."""
        while not self._is_closed.is_set():
            self._has_work.wait(RETRY_SECONDS)
            self._has_work.clear()
            self._is_closed.wait(BATCH_SECONDS)
            try:
                self._load_own()
                if time.monotonic() - self._adopted_at >= ADOPT_SECONDS:
                    self._load_abandoned()
                    self._adopted_at = time.monotonic()
            except AWAY as error:
                log.warning("spool_waits", reason=type(error).__name__)
                self._is_closed.wait(RETRY_SECONDS)
            except Exception:
                log.exception("spool_not_loaded")
                self._is_closed.wait(RETRY_SECONDS)
        deadline = time.monotonic() + LAST_SECONDS
        try:
            self._load_own(deadline)
        except AWAY as error:
            log.warning("spool_left", reason=type(error).__name__)
        self._spool.release()

    def _load_own(self, deadline: float | None = None) -> None:
        while (segment := self._spool.oldest()) is not None:
            self._load(segment, deadline)
            if not segment.is_read:
                return
            if segment.is_closed:
                self._delete(segment)
                self._spool.forget(segment)

    def _load_abandoned(self) -> None:
        for abandoned in self._spool.abandoned():
            try:
                self._load_segments(abandoned)
            finally:
                abandoned.close()

    def _load_segments(self, abandoned: AbandonedSpool) -> None:
        for segment in abandoned.segments():
            with transaction() as session:
                num_loaded = completions.num_loaded(session, segment.id)
            segment.skip(num_loaded)
            log.info("spool_adopted", segment=segment.id, num_bytes=segment.size - segment.offset)
            self._load(segment)
            self._delete(segment)

    def _load(self, segment: Segment, deadline: float | None = None) -> None:
        while not segment.is_read and (deadline is None or time.monotonic() < deadline):
            lines = segment.peek(BATCH_RECORDS, BATCH_BYTES)
            try:
                self._insert(segment, lines)
            except AWAY:
                raise
            except Exception:
                log.exception("batch_refused", segment=segment.id, number=segment.number)
                self._insert_singly(segment, lines)
            else:
                segment.advance(lines)

    def _insert(self, segment: Segment, lines: Sequence[bytes]) -> None:
        with transaction() as session:
            completions.insert_records(session, segment.id, segment.number, lines)
            crash_point("traffic.inserted")
        crash_point("traffic.loaded")

    def _insert_singly(self, segment: Segment, lines: Sequence[bytes]) -> None:
        """Inserts the records of a refused batch one by one, and skips those that are refused."""
        for line in lines:
            try:
                self._insert(segment, [line])
            except AWAY:
                raise
            except Exception:
                log.exception("record_refused", segment=segment.id, number=segment.number)
                self._on_dropped("invalid")
                with transaction() as session:
                    completions.skip_record(session, segment.id, segment.number)
            segment.advance([line])

    def _delete(self, segment: Segment) -> None:
        """Deletes a segment and then its mark, without which its records would be inserted again."""
        segment.delete()
        with transaction() as session:
            completions.forget_segment(session, segment.id)
