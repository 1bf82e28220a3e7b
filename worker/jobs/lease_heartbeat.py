"""Heartbeat thread that renews a job lease and detects when the lease has been lost.

The run continues while the database is unavailable, even beyond the deadline of the lease. After
an outage the reconciler expires no lease for one lease duration, so that workers can renew theirs.
If another worker has taken the job meanwhile, the database refuses the writes of this one.
"""

import threading
import time
from contextvars import copy_context
from typing import Self

import structlog

from app.db.session import DatabaseUnavailable, PoolExhausted
from worker.jobs import lease_client
from worker.jobs.lease_client import JobSignals, Lease, LeaseLost

log = structlog.get_logger(__name__)

# After an outage of this length the lease is taken to be lost: by then another worker has the
# job, or the whole service is down.
OUTAGE_SECONDS = 1800.0
DATABASE_AWAY = (DatabaseUnavailable, PoolExhausted)


class LeaseHeartbeat:
    """Context manager that renews a lease from its own thread.

    `orders` are the owner's requests as of the last successful heartbeat.
    """

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
            target=copy_context().run,  # its log lines name the job
            args=(self._beat,),
            name=f"lease-heartbeat-{lease.job_id}",
            daemon=True,
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def is_lost(self) -> bool:
        """True if a renewal was refused, or none has succeeded for `outage_seconds`."""
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
                # For example, the server ended an idle transaction after this process was
                # suspended. The next heartbeat may succeed.
                log.exception("heartbeat_broken", job=self.lease.job_id)
