"""Reconciler: a periodic task that repairs the effects of lost messages and lost workers.

It runs in every API process. One of them acts at a time, the one with an advisory transaction
lock. All rules are idempotent.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Final

import structlog
from prometheus_client import Counter

from app.crash_points import crash_point
from app.db import reconciliation
from app.db.leases import retry_policy
from app.db.session import DatabaseUnavailable, PoolExhausted, Session, transaction
from app.services.garbage_collector import collect
from app.settings import get_settings
from app.storage import store

log = structlog.get_logger(__name__)
leases_lost = Counter(
    "stillhouse_leases_lost", "Leases of jobs that this process ended because they had expired"
)

NOTIFICATIONS_PER_PASS: Final = 8  # wake-up messages per pass
CANCEL_HEARTBEATS: Final = 2  # after this many, a job is cancelled without its worker
# Time that a worker has to write and upload the checkpoint of a job that has run for too long.
PAUSE_GRACE_SECONDS: Final = 600.0
GARBAGE_SECONDS: Final = 60.0  # between two rounds of garbage collection


@dataclass(frozen=True)
class Report:
    """Number of changes of one pass, by rule. All are 0 if another process holds the lock."""

    is_leader: bool = False
    num_notified: int = 0
    num_lost: int = 0
    num_cancelled: int = 0
    num_woken: int = 0
    num_overdue: int = 0
    num_collected: int = 0


class Reconciler:
    """Reconciler of one API process, which calls `step` every `reconcile_seconds`."""

    def __init__(
        self, notify_workers: Callable[[], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._notify_workers = notify_workers
        self._clock = clock
        self._connected_since: float | None = None
        self._last_seen: float | None = None
        self._last_collected: float | None = None

    def step(self) -> Report:
        """Runs one pass over all rules, and garbage collection if it is due.

        Raises DatabaseUnavailable or PoolExhausted. The connected time then starts again from 0.
        """
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
        leases_lost.inc(report.num_lost)
        for _ in range(report.num_notified):
            self._notify_workers()
        if report.is_leader and self._is_time_to_collect():
            try:
                report = replace(report, num_collected=collect(store()))
                self._last_seen = self._clock()  # so that a long round does not look like an outage
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
        may_expire_leases = self._may_expire_leases(session, begun, settings.lease_seconds)
        num_lost = reconciliation.expire_leases(session, retry_policy()) if may_expire_leases else 0
        num_cancelled = reconciliation.finish_cancels(
            session, CANCEL_HEARTBEATS * settings.heartbeat_seconds
        )
        num_overdue = reconciliation.end_overdue(
            session, settings.max_runtime_seconds, PAUSE_GRACE_SECONDS
        )
        num_woken = reconciliation.wake(session)
        num_notified = reconciliation.mark_due_notified(
            session, settings.ring_again_seconds, NOTIFICATIONS_PER_PASS
        )
        return Report(True, num_notified, num_lost, num_cancelled, num_woken, num_overdue)

    def _may_expire_leases(self, session: Session, begun: float, lease_seconds: float) -> bool:
        """Returns whether expired leases may be ended.

        True if this process and the database server have been up and connected for a full lease, so
        that every worker had time to renew. Otherwise all leases would be lost after an outage.
        """
        server_age = reconciliation.server_age_seconds(session)
        self._note_connection(begun, lease_seconds)
        assert self._connected_since is not None
        connected = self._clock() - self._connected_since
        return min(connected, server_age) >= lease_seconds

    def _note_connection(self, begun: float, lease_seconds: float) -> None:
        """Records a contact with the database, and restarts the connected time after a gap.

        A gap means that the server was away or that this process was suspended. At most half a
        lease may pass without contact, so that workers have the other half to renew their leases.
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
