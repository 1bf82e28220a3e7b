"""What makes lost messages and dead workers harmless: a look at all jobs, every few seconds, in every API process.

One process acts at a time (an advisory transaction lock), and every rule may run twice without harm.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Final

import structlog

from app.crash_points import crash_point
from app.db import reconciliation
from app.db.leases import RetryPolicy
from app.db.session import DatabaseUnavailable, PoolExhausted, Session, transaction
from app.services.garbage_collector import collect
from app.settings import get_settings
from app.storage import store

log = structlog.get_logger(__name__)

RINGS_A_PASS: Final = 8
CANCEL_HEARTBEATS: Final = 2  # a worker that has not obeyed by then is not waited for
PAUSE_GRACE_SECONDS: Final = (
    600.0  # for a worker to write and store the checkpoint of an overdue job
)
GARBAGE_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Report:
    """What one pass did; all zeros if another process holds the lock."""

    is_leader: bool = False
    num_notified: int = 0
    num_lost: int = 0
    num_cancelled: int = 0
    num_woken: int = 0
    num_overdue: int = 0
    num_collected: int = 0


class Reconciler:
    """One API process's share of the looking. `step` is called every `reconcile_seconds`."""

    def __init__(
        self, notify_workers: Callable[[], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._notify_workers = notify_workers
        self._clock = clock
        self._connected_since: float | None = None
        self._last_seen: float | None = None
        self._last_collected: float | None = None

    def step(self) -> Report:
        """One pass over all rules. Raises DatabaseUnavailable or PoolExhausted, and then counts as cut off."""
        begun = self._clock()
        try:
            with transaction() as session:
                report = self._apply_rules(session, begun)
                crash_point("reconcile.inside")
        except (DatabaseUnavailable, PoolExhausted):
            self._connected_since = None
            raise
        self._last_seen = self._clock()
        crash_point("reconcile.committed")
        for _ in range(report.num_notified):
            self._notify_workers()
        if report.is_leader and self._is_time_to_collect():
            try:
                report = replace(report, num_collected=collect(store()))
                self._last_seen = self._clock()  # a long round is no outage
            finally:
                self._last_collected = self._clock()
        if report not in {Report(), Report(is_leader=True)}:
            log.info("reconciled", **asdict(report))
        return report

    def _apply_rules(self, session: Session, begun: float) -> Report:
        settings = get_settings()
        if not reconciliation.try_lead(session):
            self._note_connection(begun, settings.lease_seconds)
            return Report()
        may_reap = self._may_reap(session, begun, settings.lease_seconds)
        retry_policy = RetryPolicy(settings.max_losses, settings.retry_backoff_seconds)
        num_lost = reconciliation.expire_leases(session, retry_policy) if may_reap else 0
        num_cancelled = reconciliation.finish_cancels(
            session, CANCEL_HEARTBEATS * settings.heartbeat_seconds
        )
        num_overdue = reconciliation.end_overdue(
            session, settings.max_runtime_seconds, PAUSE_GRACE_SECONDS
        )
        num_woken = reconciliation.wake(session)
        num_notified = reconciliation.ring_due(session, settings.ring_again_seconds, RINGS_A_PASS)
        return Report(True, num_notified, num_lost, num_cancelled, num_woken, num_overdue)

    def _may_reap(self, session: Session, begun: float, lease_seconds: float) -> bool:
        """Whether every worker has had a whole lease's time to reach the database.

        An outage silences all workers alike; taking their jobs right after it would lose the whole fleet.
        """
        server_age = reconciliation.server_age_seconds(session)
        self._note_connection(begun, lease_seconds)
        assert self._connected_since is not None
        connected = self._clock() - self._connected_since
        return min(connected, server_age) >= lease_seconds

    def _note_connection(self, begun: float, lease_seconds: float) -> None:
        """Begins anew to count the connected time after a gap: a stopped server, or a stopped process of ours.

        Half a lease without contact is the most that leaves the workers time to renew what they hold.
        """
        now = self._clock()
        seen = begun if self._last_seen is None else self._last_seen
        if self._connected_since is None or now - seen > lease_seconds / 2:
            self._connected_since = now
        self._last_seen = now

    def _is_time_to_collect(self) -> bool:
        return (
            self._last_collected is None or self._clock() - self._last_collected >= GARBAGE_SECONDS
        )
