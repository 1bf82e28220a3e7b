"""JSON bodies read strictly, of known callers only: no NaN, no half surrogates, no bottomless nesting reach a handler."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from app.api.deps import identify


class StrictRequest(Request):
    async def json(self) -> Any:  # Any: whatever JSON the client sent
        return orjson.loads(await self.body())


class StrictRoute(APIRoute):
    """A route whose body is parsed by orjson; its errors are JSONDecodeErrors, as FastAPI expects."""

    def get_route_handler(
        self,
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:  # Any: as FastAPI has it
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            await run_in_threadpool(identify, request)  # before the body: strangers send nothing that is kept
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly
