"""Delivers events to webhook endpoints, in a background thread of each API process.

Each process claims due deliveries under a lease, so that several processes share them and none is
lost with a killed process. An event is delivered at least once: if a process is killed between the
response and its record, the event is sent again.
"""

import asyncio
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

import structlog

from app.crash_points import crash_point
from app.db.session import DatabaseUnavailable, PoolExhausted, Session, transaction
from app.db.webhooks import deliveries
from app.db.webhooks.deliveries import AttemptResult, ClaimedDelivery, DisableRule
from app.services.webhooks.address_guard import AddressGuard
from app.services.webhooks.schedule import delay_seconds
from app.services.webhooks.sender import TIMEOUT_SECONDS, Answer, Message, send, webhook_guard

log = structlog.get_logger(__name__)

POLL_SECONDS: Final = 1.0
MAX_IN_FLIGHT: Final = 16  # attempts at the same time, per process
LEASE_SECONDS: Final = 4 * TIMEOUT_SECONDS
RECORD_PAUSE_SECONDS: Final = 3.0  # between two tries to record a result, within the lease
STOP_SECONDS: Final = 3.0  # for attempts in progress, when the process stops
JOIN_SECONDS: Final = 10.0
GONE: Final = 410
# Two deliveries have then failed completely.
DISABLE_RULE: Final = DisableRule(num_failures=20, seconds=5 * 86_400.0)


class Deliverer:
    """Claims, sends and records deliveries. `clock` replaces the time of the database in tests."""

    def __init__(self, guard: AddressGuard, *, clock: Callable[[], datetime] | None = None) -> None:
        self._guard = guard
        self._clock = clock
        self._in_flight: dict[asyncio.Task[None], ClaimedDelivery] = {}
        self._is_database_away = False

    async def run(self, stopping: "asyncio.Future[None]") -> None:
        """Delivers until `stopping` is done. Then ends or releases the attempts in progress."""
        while not stopping.done():
            num_started = await self._try_to_start_due()
            # If there may be more due deliveries, continues as soon as an attempt has ended.
            waited: set[asyncio.Future[None]] = {stopping}
            if num_started:
                waited |= self._in_flight.keys()
            await asyncio.wait(waited, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        await self._stop()

    async def deliver_due(self) -> int:
        """Makes one attempt of each delivery that is due now, and returns their number.

        Raises DatabaseUnavailable or PoolExhausted.
        """
        num_attempts = 0
        while num_started := await self._start_due():
            num_attempts += num_started
            await asyncio.wait(self._in_flight)
        return num_attempts

    async def _try_to_start_due(self) -> int:
        """Calls `_start_due`, and logs its errors."""
        try:
            num_started = await self._start_due()
        except (DatabaseUnavailable, PoolExhausted) as fault:
            if not self._is_database_away:  # so that an outage is logged once
                log.warning("webhooks_postponed", reason=type(fault).__name__)
            self._is_database_away = True
            return 0
        except Exception:
            log.exception("webhooks_not_claimed")  # the thread must keep running
            return 0
        self._is_database_away = False
        return num_started

    async def _start_due(self) -> int:
        """Claims as many due deliveries as there is room for, and starts to send them."""
        claimed = await self._claim()
        for delivery in claimed:
            task = asyncio.create_task(self._attempt(delivery))
            self._in_flight[task] = delivery
            task.add_done_callback(self._in_flight.pop)
        return len(claimed)

    async def _claim(self) -> list[ClaimedDelivery]:
        num_free = MAX_IN_FLIGHT - len(self._in_flight)
        if not num_free:
            return []
        in_flight = list(self._in_flight.values())

        def claim() -> list[ClaimedDelivery]:
            """Claims in one transaction, in a thread of the pool."""
            with transaction() as session:
                return deliveries.claim(
                    session,
                    self._now(session),
                    lease_seconds=LEASE_SECONDS,
                    most=num_free,
                    in_flight=in_flight,
                )

        return await asyncio.to_thread(claim)

    async def _attempt(self, delivery: ClaimedDelivery) -> None:
        """Sends a delivery and records the result."""
        message = Message.of(
            delivery.event_id,
            delivery.event_type,
            delivery.event_data,
            delivery.event_created_at,
        )
        try:
            answer = await send(self._guard, delivery.url, message, delivery.secrets)
        except Exception:
            log.exception("webhook_not_sent", id=delivery.id)
            answer = Answer(None, "internal error of the service", 0.0)
        crash_point("webhook.sent")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LEASE_SECONDS - TIMEOUT_SECONDS
        while True:
            try:
                await asyncio.to_thread(self._record, delivery, answer)
                return
            except (DatabaseUnavailable, PoolExhausted) as fault:
                if loop.time() >= deadline:  # another attempt follows when the lease has ended
                    log.warning("webhook_not_recorded", id=delivery.id, reason=type(fault).__name__)
                    return
                await asyncio.sleep(RECORD_PAUSE_SECONDS)
            except Exception:
                log.exception("webhook_not_recorded", id=delivery.id)
                return

    def _record(self, delivery: ClaimedDelivery, answer: Answer) -> None:
        with transaction() as session:
            now = self._now(session)
            result = AttemptResult(
                delivery.claimed_at, answer.duration_seconds, answer.status_code, answer.error
            )
            if answer.error is None:
                deliveries.record_success(session, delivery, result)
                return
            delay = delay_seconds(
                delivery.num_failures + 1,
                random=random.random(),
                retry_after_seconds=answer.retry_after_seconds,
            )
            gone = f"the receiver answered with {GONE} (gone)"
            reason = deliveries.record_failure(
                session,
                delivery,
                result,
                retry_at=now + timedelta(seconds=delay) if delay is not None else None,
                disable_rule=DISABLE_RULE,
                disable_reason=gone if answer.status_code == GONE else None,
            )
        if reason is not None:
            log.warning("webhook_endpoint_disabled", id=delivery.endpoint_id, reason=reason)

    async def _stop(self) -> None:
        """Waits for the attempts in progress for a short time, and releases the others."""
        if not self._in_flight:
            return
        await asyncio.wait(self._in_flight, timeout=STOP_SECONDS)
        left = dict(self._in_flight)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if left:
            with suppress(DatabaseUnavailable, PoolExhausted):  # the leases then end by themselves
                await asyncio.to_thread(self._release, list(left.values()))

    def _release(self, unfinished: list[ClaimedDelivery]) -> None:
        with transaction() as session:
            deliveries.release(session, unfinished, self._now(session))

    def _now(self, session: Session) -> datetime:
        return self._clock() if self._clock is not None else deliveries.server_time(session)


class DelivererThread(threading.Thread):
    """Background thread that delivers events, with its own event loop."""

    def __init__(self) -> None:
        super().__init__(name="webhooks", daemon=True)
        self._stopping: Future[None] = Future()

    def run(self) -> None:
        try:
            asyncio.run(self._deliver())
        except Exception:
            log.exception("webhook_thread_failed")

    async def _deliver(self) -> None:
        await Deliverer(webhook_guard()).run(asyncio.wrap_future(self._stopping))

    def stop(self) -> None:
        self._stopping.set_result(None)
        self.join(JOIN_SECONDS)
