"""JSON bodies read strictly: no NaN, no half surrogates, no bottomless nesting reach a handler."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute


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
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly
