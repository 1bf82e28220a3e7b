"""Tables and JSON of the commands that work over HTTP.

On a terminal, tables fit its width and have colours. Elsewhere, columns are aligned with spaces,
and no cell is shortened, so that other programs can read them.
"""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Final

import typer
from rich.table import Column, Table
from rich.text import Text

from app.commands.shell import Json, console, escaped, messages, note

Cell = str | int | float | None

STYLES: Final = {
    "succeeded": "green",
    "completed": "green",
    "resident": "green",
    "running": "cyan",
    "in_progress": "cyan",
    "loading": "cyan",
    "paused": "yellow",
    "warn": "yellow",
    "failed": "red",
    "error": "red",
    "cancelled": "dim",
    "expired": "dim",
}


def show_json(document: Json) -> None:
    """Prints one JSON document."""
    print(escaped(json.dumps(document, indent=2, ensure_ascii=False)))


def show_json_line(document: Json) -> None:
    """Prints one JSON document on one line."""
    print(escaped(json.dumps(document, ensure_ascii=False)), flush=True)


def show_table(headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Prints a table. The first column, which has the ids, is never shortened on a terminal."""
    texts = [[text_of(cell) for cell in row] for row in rows]
    if console.is_terminal:
        first, *others = headings
        table = Table(Column(first, no_wrap=True, overflow="fold"), *others)
        for row in texts:
            table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
        console.print(table)
        return
    lines = [[heading.upper() for heading in headings], *texts]
    widths = [max(len(line[number]) for line in lines) for number in range(len(headings))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())


def show_fields(fields: Iterable[tuple[str, Cell]]) -> None:
    """Prints names and values, one pair per line. Fields without a value are left out."""
    shown = [(name, text_of(value)) for name, value in fields if value not in (None, "")]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print_dimmed(f"{name.ljust(width)}  ", value, STYLES.get(value, ""))


def print_dimmed(beginning: str, text: str, style: str = "") -> None:
    """Prints one line with a dim beginning, and the rest in a style."""
    line = Text.assemble((beginning, "dim"), (text, style))
    console.print(line, soft_wrap=True, highlight=False)


def text_of(cell: Cell) -> str:
    """Returns a cell as text on one line."""
    if cell is None:
        return "–"
    if isinstance(cell, int):
        return f"{cell:,}" if console.is_terminal else str(cell)
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return printable(" ".join(cell.split()))


def printable(text: str) -> str:
    """Returns text of the service for standard output: on a terminal, with escapes."""
    return escaped(text) if console.is_terminal else text


def moment(seconds: float | None) -> str | None:
    """Returns a time in seconds since the epoch as local time, or None."""
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def confirm(question: str, *, is_confirmed: bool) -> None:
    """Asks the question unless `is_confirmed`. Exits with status 1 if the answer is no.

    Without a terminal, which could answer, it exits with status 2.
    """
    if is_confirmed:
        return
    if not (sys.stdin.isatty() and messages.is_terminal):
        note("stillhouse: without a terminal, confirm the deletion with --yes")
        raise typer.Exit(2)
    if not typer.confirm(question, err=True):
        note("Nothing was deleted")
        raise typer.Exit(1)
