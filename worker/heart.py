"""The heartbeat of a lease: renews it from a thread of its own, and knows when it must be taken for lost."""

import threading
import time
from typing import Self

import structlog

from app.db.session import DatabaseUnavailable, PoolExhausted
from worker import ledger
from worker.ledger import AuthorityLost, Lease, Orders

log = structlog.get_logger(__name__)

PATIENCE = 0.7  # of a lease without a renewal: stop well before another worker may take the job
DATABASE_AWAY = (DatabaseUnavailable, PoolExhausted)


class Heart:
    """Beats while the block runs; `orders` are the newest that came back."""

    def __init__(self, lease: Lease, *, claimed_at: float, beat_seconds: float, lease_seconds: float) -> None:
        """claimed_at: the monotonic clock before the claim was sent."""
        self.lease = lease
        self.orders = Orders(cancel=False, pause=False)
        self._beat_seconds = beat_seconds
        self._patience_seconds = PATIENCE * lease_seconds
        self._renewed_at = claimed_at
        self._is_refused = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heart-{lease.job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def is_lost(self) -> bool:
        """Whether the lease was refused, or could not be renewed for so long that it may be over."""
        return self._is_refused or time.monotonic() - self._renewed_at > self._patience_seconds

    def _beat(self) -> None:
        while not self._is_over.wait(self._beat_seconds):
            begun = time.monotonic()
            try:
                self.orders = ledger.heartbeat(self.lease)
                self._renewed_at = begun
            except AuthorityLost:
                self._is_refused = True
                return
            except DATABASE_AWAY as error:
                log.warning("heartbeat_failed", job=self.lease.job_id, error=type(error).__name__)
