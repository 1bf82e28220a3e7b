"""The API in a process of its own that measures how long its event loop is blocked: `python -m tests.app.api.lag_server`.

It prints its port. `GET /longest-block` returns the longest block in seconds since the last call.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from app.api.connections import BoundedProtocol
from app.main import create_app

TICK_SECONDS = 0.001


class Probe:
    """Measures how late a periodic task of the event loop runs.

    A process that other processes keep from running looks blocked by the clock, but uses no CPU time meanwhile:
    the smaller of both times is what the process itself has blocked.
    """

    def __init__(self) -> None:
        self.longest_seconds = 0.0

    async def run(self) -> None:
        while True:
            began, cpu_began = time.perf_counter(), time.process_time()
            await asyncio.sleep(TICK_SECONDS)
            late = time.perf_counter() - began - TICK_SECONDS
            self.longest_seconds = max(
                self.longest_seconds, min(late, time.process_time() - cpu_began)
            )

    def take(self) -> float:
        longest, self.longest_seconds = self.longest_seconds, 0.0
        return longest


def create_probed_app() -> FastAPI:
    app, probe = create_app(), Probe()
    serve = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(probe.run())
        async with serve(app):
            yield
        task.cancel()

    app.router.lifespan_context = lifespan

    @app.get("/longest-block")
    async def longest_block() -> float:
        return probe.take()

    return app


if __name__ == "__main__":
    config = uvicorn.Config(
        create_probed_app(),
        host="127.0.0.1",
        port=0,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
    )
    socket = config.bind_socket()
    print(socket.getsockname()[1], flush=True)
    uvicorn.Server(config).run(sockets=[socket])
