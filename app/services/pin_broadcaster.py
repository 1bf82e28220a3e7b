"""Sends the list of pinned models to all serve workers periodically.

It is repeated because workers may start, restart or miss a message.
"""

import asyncio

import structlog
from fastapi.concurrency import run_in_threadpool

from app.contracts.control import Keep
from app.db.session import DatabaseUnavailable, PoolExhausted
from app.errors import Unavailable
from app.routing.router import RequestRouter
from app.services import model_serving

log = structlog.get_logger(__name__)


async def tell_pins(request_router: RequestRouter) -> None:
    """Sends the list of pinned models now. Raises Unavailable if no worker received it."""
    await request_router.tell(Keep(models=await run_in_threadpool(model_serving.all_pinned)))


class PinBroadcaster:
    """Periodic task of an API process that sends the pins.

    Every API process runs one. Duplicate messages have no effect.
    """

    def __init__(self, request_router: RequestRouter) -> None:
        self._request_router = request_router

    async def start(self) -> None:
        self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def stop(self) -> None:
        self._telling.cancel()
        await asyncio.gather(self._telling, return_exceptions=True)

    async def _tell(self) -> None:
        could_tell = True  # so that an outage is logged once
        while True:
            await asyncio.sleep(self._request_router.settings.reconcile_seconds)
            try:
                if self._request_router.workers:
                    await tell_pins(self._request_router)
                could_tell = True
            except (Unavailable, DatabaseUnavailable, PoolExhausted) as fault:
                if could_tell:
                    log.warning("pins_not_told", reason=type(fault).__name__)
                could_tell = False
            except Exception:
                log.exception("pins_not_told")  # the loop must survive any error
