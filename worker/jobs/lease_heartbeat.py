"""The heartbeat of a lease: renews it from a thread of its own, and knows when it must be taken for lost.

A lease that could not be renewed in time is not lost by that: after an outage of the database nobody is reaped for a
whole lease, and the run goes on. Should another worker have the job by then, the database refuses whatever this one writes.
"""

import threading
import time
from typing import Self

import structlog

from app.db.session import DatabaseUnavailable, PoolExhausted
from worker.jobs import lease_client
from worker.jobs.lease_client import JobSignals, Lease, LeaseLost

log = structlog.get_logger(__name__)

OUTAGE_SECONDS = (
    1800.0  # without the database: by then another worker has the job, or nobody works any more
)
DATABASE_AWAY = (DatabaseUnavailable, PoolExhausted)


class LeaseHeartbeat:
    """Beats while the block runs; `orders` are the newest that came back."""

    def __init__(
        self, lease: Lease, *, beat_seconds: float, outage_seconds: float = OUTAGE_SECONDS
    ) -> None:
        self.lease = lease
        self.orders = JobSignals(cancel=False, pause=False)
        self._beat_seconds = beat_seconds
        self._outage_seconds = outage_seconds
        self._renewed_at = time.monotonic()
        self._is_refused = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, name=f"heart-{lease.job_id}", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def is_lost(self) -> bool:
        """Whether the lease was refused, or the database has been away for so long that nobody waits for the run."""
        return self._is_refused or time.monotonic() - self._renewed_at > self._outage_seconds

    def _beat(self) -> None:
        while not self._is_over.wait(self._beat_seconds):
            try:
                self.orders = lease_client.heartbeat(self.lease)
                self._renewed_at = time.monotonic()
            except LeaseLost:
                self._is_refused = True
                return
            except DATABASE_AWAY as error:
                log.warning("heartbeat_failed", job=self.lease.job_id, error=type(error).__name__)
            except Exception:
                # such as a transaction that the server ended because we stood still in it; the next beat may do
                log.exception("heartbeat_broken", job=self.lease.job_id)
