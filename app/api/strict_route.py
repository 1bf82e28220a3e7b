"""JSON bodies of known callers only, read strictly: no NaN, no half surrogates, and limited in their shape."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from app.api.deps import identify
from app.json_limits import parse_limited, refuse_crowded


class StrictRequest(Request):
    async def json(self) -> Any:  # Any: whatever JSON the client sent
        """The body parsed by orjson. Raises JSONDecodeError or BadRequest."""
        if not hasattr(self, "_json"):
            value = parse_limited(await self.body())
            await asyncio.sleep(
                0
            )  # each step takes milliseconds of the event loop for a large body
            refuse_crowded(value)
            await asyncio.sleep(0)
            self._json = value
        return self._json


class StrictRoute(APIRoute):
    """A route whose body is parsed by orjson; its errors are JSONDecodeErrors, as FastAPI expects."""

    def get_route_handler(
        self,
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:  # Any: as FastAPI has it
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            await run_in_threadpool(
                identify, request
            )  # before the body: strangers send nothing that is kept
            strict = StrictRequest(request.scope, request.receive)
            if self.body_field is not None:
                with suppress(orjson.JSONDecodeError):  # FastAPI meets it again and answers it
                    await (
                        strict.json()
                    )  # here, because FastAPI hides any other error that it raises
            return await handle(strict)

        return handle_strictly
