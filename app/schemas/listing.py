"""The list object of every paginated route."""

from collections.abc import Sequence
from typing import Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel


class HasId(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=BaseModel)


class Listing(BaseModel, Generic[Item]):
    """One page; the next one begins `after` last_id."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


def ends(items: Sequence[HasId]) -> tuple[str | None, str | None]:
    """First and last id of a page."""
    return (items[0].id, items[-1].id) if items else (None, None)
