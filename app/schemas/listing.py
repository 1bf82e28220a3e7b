"""Response body of all routes that return pages of a list."""

from collections.abc import Sequence
from typing import Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel


class HasId(Protocol):
    """Object with an id."""

    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=BaseModel)


class Listing(BaseModel, Generic[Item]):
    """Page of a list. Pass `last_id` as `after` to get the next page."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


def ends(items: Sequence[HasId]) -> tuple[str | None, str | None]:
    """Returns the first and the last id of a page."""
    return (items[0].id, items[-1].id) if items else (None, None)
