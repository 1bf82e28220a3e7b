"""`stillhouse usage`: requests and tokens by time, over HTTP."""

import re
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from app.commands.remote.connection import over_http
from app.commands.remote.output import Cell, show_json, show_json_line, show_table
from app.commands.shell import IsJson, Json

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

USAGE: Final = "/v1/organization/usage/completions"
SECONDS: Final = {"m": 60, "h": 3600, "d": 86_400}
AGE: Final = re.compile(r"(\d{1,6})([mhd])")
COUNTS: Final = (
    ("requests", "num_model_requests"),
    ("input tokens", "input_tokens"),
    ("cached tokens", "input_cached_tokens"),
    ("output tokens", "output_tokens"),
)
Many = list[str] | None


@over_http
def usage(
    service: "RemoteService",
    start: Annotated[
        str, typer.Option(help="Begin: 7d (ago), 36h, 2026-11-29 or 2026-11-29T08:00.")
    ] = "7d",
    end: Annotated[str | None, typer.Option(help="End, in the same forms; default: now.")] = None,
    bucket: Annotated[Literal["1m", "1h", "1d"], typer.Option(help="Length of an entry.")] = "1d",
    group_by: Annotated[
        Many,
        typer.Option(help="project_id, api_key_id, model or batch; can be repeated."),
    ] = None,
    model: Annotated[Many, typer.Option(help="Only this model; can be repeated.")] = None,
    project: Annotated[Many, typer.Option(help="Only this project; can be repeated.")] = None,
    key_id: Annotated[Many, typer.Option(help="Only this API key; can be repeated.")] = None,
    is_json: IsJson = False,
    is_all: Annotated[bool, typer.Option("--all", help="With --json: one entry per line.")] = False,
) -> None:
    """Shows how many requests and tokens were used."""
    groups = list(group_by or ())
    query = {
        "start_time": time_of(start),
        "end_time": None if end is None else time_of(end),
        "bucket_width": bucket,
        "group_by[]": groups or None,
        "models[]": model or None,
        "project_ids[]": project or None,
        "api_key_ids[]": key_id or None,
    }
    entries: list[Json] = []
    page: Json = {"has_more": True, "next_page": None}
    while page["has_more"]:
        page = service.get(USAGE, {**query, "page": page["next_page"]})
        entries += page["data"]
    if is_json and is_all:
        for entry in entries:
            show_json_line(entry)
    elif is_json:
        show_json({**page, "data": entries})
    else:
        headings = ("begin", *groups, *(heading for heading, _ in COUNTS))
        rows = [usage_row(e, result, groups) for e in entries for result in e["results"]]
        show_table(headings, rows)


def usage_row(entry: Json, result: Json, groups: list[str]) -> tuple[Cell, ...]:
    """Returns the cells of one result of a bucket."""
    begin = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["start_time"]))
    keys = (None if result.get(name) is None else str(result[name]) for name in groups)
    return (begin, *keys, *(result.get(name, 0) for _, name in COUNTS))


def time_of(text: str) -> int:
    """Returns seconds since the epoch. Raises typer.BadParameter."""
    if age := AGE.fullmatch(text):
        return int(time.time()) - int(age[1]) * SECONDS[age[2]]
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError):
        raise typer.BadParameter(
            f"{text!r} is not a time; give an age such as 7d or 36h, or 2026-11-29T08:00"
        ) from None
