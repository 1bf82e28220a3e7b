"""Route class that authenticates before it reads the body, and parses JSON strictly.

The body must not contain NaN or lone surrogates. The number of its arrays, objects and fields is
limited.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from app.api.deps import identify
from app.json_limits import parse_limited, refuse_complex


class StrictRequest(Request):
    """Request whose JSON body is parsed by orjson within the limits of `app.json_limits`."""

    async def json(self) -> Any:  # Any: arbitrary JSON of the client
        """Returns the parsed body. Raises JSONDecodeError or BadRequest."""
        if not hasattr(self, "_json"):
            value = parse_limited(await self.body())
            await asyncio.sleep(0)  # each step blocks the event loop if the body is large
            refuse_complex(value)
            await asyncio.sleep(0)
            self._json = value
        return self._json


class StrictRoute(APIRoute):
    """Route that authenticates the caller first and reads its body as a `StrictRequest`."""

    def get_route_handler(
        self,
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:  # Any: FastAPI's own type
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            """Authenticates the caller, parses the body and handles the request."""
            # Before the body is read, so that no body of an unknown client is kept in memory.
            await run_in_threadpool(identify, request)
            strict = StrictRequest(request.scope, request.receive)
            if self.body_field is not None:
                # Parsed here, because FastAPI would hide any error but a JSONDecodeError. It parses
                # a malformed body again and reports that error itself.
                with suppress(orjson.JSONDecodeError):
                    await strict.json()
            return await handle(strict)

        return handle_strictly
