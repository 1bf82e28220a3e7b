"""What routes share: who asks, and which page they want."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer

from app import auth
from app.auth import Principal

__all__ = ["AskedPage", "Page", "Principal", "identify", "page", "require"]

# For /openapi.json only: `auth` reads the header itself, because it tells malformed keys from missing ones.
BEARER = HTTPBearer(
    auto_error=False, scheme_name="api_key", description="A key `sk-sh-{id}-{secret}`"
)


def require(
    scope: str,
) -> Callable[..., Coroutine[Any, Any, Principal]]:  # Any: as coroutines have it
    """A dependency that gives the principal, or refuses with 401 or 403."""

    async def principal(
        request: Request, documented: Annotated[object, Depends(BEARER)]
    ) -> Principal:
        found: Principal | None = getattr(
            request.state, "principal", None
        )  # no thread for what is known
        if found is None:
            found = await run_in_threadpool(identify, request)
        found.demand(scope)
        return found

    return principal


def identify(request: Request) -> Principal:
    """Who asks; looked up once a request. Raises Unauthenticated."""
    known: Principal | None = getattr(request.state, "principal", None)
    if known is None:
        known = auth.authenticate(request.headers.get("authorization"))
        request.state.principal = known
    return known


@dataclass(frozen=True)
class Page:
    """A keyset page: what comes after the object with id `after`."""

    after: str | None
    limit: int
    order: Literal["asc", "desc"]


def page(
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Page:
    return Page(after, limit, order)


AskedPage = Annotated[Page, Depends(page)]
