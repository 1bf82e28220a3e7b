"""Lists of objects, page by page, as a table or as JSON."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from app.commands.remote.output import Cell, show_json, show_json_line, show_table
from app.commands.shell import Json, messages, note

if TYPE_CHECKING:
    from app.commands.remote_service import Query, RemoteService

MAX_PAGE: Final = 100  # the longest page that all lists of the API have
Limit = Annotated[int, typer.Option(min=1, help="Greatest number of objects.")]
After = Annotated[str | None, typer.Option(metavar="ID", help="Begin after this object.")]
All = Annotated[bool, typer.Option("--all", help="List all objects; JSON is one object per line.")]


@dataclass(frozen=True)
class Window:
    """Part of a list that the options of a command name, and whether to print JSON."""

    limit: int
    after: str | None
    is_all: bool
    is_json: bool


@dataclass(frozen=True)
class Columns:
    """Headings of a table, and the function that returns the cells of an object."""

    headings: Sequence[str]
    cells_of: Callable[[Json], Sequence[Cell]]


def show_list(
    service: "RemoteService",
    path: str,
    window: Window,
    columns: Columns,
    query: "Query | None" = None,
) -> None:
    """Prints the objects of a list as a table, a JSON document, or JSON lines with --all."""
    found = pages(service, path, window, query)
    if window.is_json and window.is_all:
        for page in found:
            for item in page["data"]:
                show_json_line(item)
        return
    merged = merge(found)
    if window.is_json:
        show_json(merged)
        return
    show_table(columns.headings, map(columns.cells_of, merged["data"]))
    if merged["has_more"] and messages.is_terminal:
        note(f"There are more: --after {merged['last_id']}, or --all")


def pages(
    service: "RemoteService", path: str, window: Window, query: "Query | None" = None
) -> Iterator[Json]:
    """Yields the pages of a list until the limit or the end of the list."""
    num_left = None if window.is_all else window.limit
    after = window.after
    while num_left is None or num_left > 0:
        size = MAX_PAGE if num_left is None else min(num_left, MAX_PAGE)
        page = service.get(path, {**(query or {}), "limit": size, "after": after})
        yield page
        if not page["has_more"] or not page["data"]:
            return
        after = page["data"][-1]["id"]
        num_left = None if num_left is None else num_left - len(page["data"])


def merge(found: Iterator[Json]) -> Json:
    """Returns several pages as one."""
    merged: Json = next(found)
    for page in found:
        merged["data"] += page["data"]
        merged |= {"last_id": page.get("last_id"), "has_more": page["has_more"]}
    return merged
