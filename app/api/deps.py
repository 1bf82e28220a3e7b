"""Dependencies of routes: authentication of the caller, and pagination."""

import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.dependencies.models import Dependant
from fastapi.security import HTTPBearer

from app import auth
from app.auth import Principal
from app.errors import BadRequest

__all__ = ["AskedPage", "Page", "Principal", "identify", "known_query", "page", "require"]

# Only for /openapi.json. `app.auth` reads the header itself, because it distinguishes malformed
# keys from missing ones.
BEARER = HTTPBearer(
    auto_error=False, scheme_name="api_key", description="A key `sk-sh-{id}-{secret}`"
)


def require(
    scope: str,
) -> Callable[..., Coroutine[Any, Any, Principal]]:  # Any: a coroutine's unused types
    """Returns a dependency that gives the caller and checks that its key has the scope.

    The dependency raises Unauthenticated (401) or Forbidden (403).
    """

    async def principal(
        request: Request, documented: Annotated[object, Depends(BEARER)]
    ) -> Principal:
        """Returns the caller. Uses a thread only if the caller has not been identified yet."""
        found: Principal | None = getattr(request.state, "principal", None)
        if found is None:
            found = await run_in_threadpool(identify, request)
        found.demand(scope)
        return found

    return principal


def identify(request: Request) -> Principal:
    """Returns the caller, authenticated once per request. Raises Unauthenticated."""
    known: Principal | None = getattr(request.state, "principal", None)
    if known is None:
        known = auth.authenticate(request.headers.get("authorization"))
        request.state.principal = known
    return known


@dataclass(frozen=True)
class Page:
    """Requested page of a list: up to `limit` objects after the one with the id `after`."""

    after: str | None
    limit: int
    order: Literal["asc", "desc"]


def page(
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Page:
    """Reads the page from the query parameters."""
    return Page(after, limit, order)


AskedPage = Annotated[Page, Depends(page)]


def known_query(further: Mapping[str, str] | None = None) -> Callable[[Request], None]:
    """Returns a dependency that refuses query parameters which the route does not read.

    An ignored filter would return objects that the client did not ask for. `further` has the names
    of other parameters that the route reads from the request, each with the regex that it matches.
    """
    patterns = further or {}

    def refuse_unknown(request: Request) -> None:
        """Raises BadRequest for the first unknown query parameter."""
        known = query_names(request.scope["route"].dependant)
        for name in request.query_params:
            if name in known or any(re.fullmatch(p, name) for p in patterns.values()):
                continue
            readable = ", ".join(sorted({*known, *patterns}))
            raise BadRequest(
                f"unknown query parameter: {name[:64]}; this route reads {readable}",
                "unknown_parameter",
                name[:64],
            )

    return refuse_unknown


def query_names(dependant: Dependant) -> set[str]:
    """Returns the names of the query parameters of a route and its dependencies."""
    names = {field.alias for field in dependant.query_params}
    return names.union(*(query_names(child) for child in dependant.dependencies))
