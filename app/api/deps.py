"""What routes share: who asks, and which page they want."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Header, Query

from app import auth
from app.auth import Principal
from app.db.session import transaction

__all__ = ["AskedPage", "Page", "Principal", "page", "require"]


def require(scope: str) -> Callable[..., Principal]:
    """A dependency that gives the principal, or refuses with 401 or 403."""

    def principal(authorization: Annotated[str | None, Header()] = None) -> Principal:
        with transaction() as session:
            found = auth.authenticate(session, authorization)
        found.demand(scope)
        return found

    return principal


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
