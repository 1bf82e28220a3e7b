"""Events of a job: pages of them, and the stream of new ones."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from app.commands.progress_lines import ENDED
from app.commands.remote.listing import Window, merge, pages
from app.commands.remote.output import (
    STYLES,
    print_dimmed,
    printable,
    show_json,
    show_json_line,
)
from app.commands.shell import Json

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

WAIT_SECONDS: Final = 1.0


def print_events(service: "RemoteService", job_path: str, window: Window) -> None:
    """Prints a job's events, oldest first. A JSON document has the order of the API instead."""
    order = "asc" if window.is_all else "desc"
    found = pages(service, f"{job_path}/events", window, {"order": order})
    if window.is_json and not window.is_all:
        show_json(merge(found))
        return
    if window.is_all:
        for page in found:
            for event in page["data"]:
                _print(event, is_json=window.is_json)
        return
    for event in reversed(merge(found)["data"]):
        _print(event, is_json=False)


def follow_events(service: "RemoteService", job_path: str, *, is_json: bool) -> None:
    """Prints a job's events as they happen, until it has ended. Raises RemoteError."""
    for event in _stream(service, job_path):
        _print(event, is_json=is_json)


def _stream(service: "RemoteService", job_path: str) -> Iterator[Json]:
    """Yields all events. After a lost connection, continues after the last event that arrived.

    However long there is no event, the stream ends only when the job has ended, or when the service
    does not answer for PATIENCE_SECONDS.
    """
    from app.commands.remote_service import TemporaryError

    after, has_ended = None, False
    while True:
        query = {"stream": "true"} | ({"after": after} if after else {})
        try:
            for event in service.stream("GET", f"{job_path}/events", query=query):
                after = event["id"]
                yield event
        except TemporaryError:
            if has_ended:  # the rest of the events cannot be read
                raise
            time.sleep(WAIT_SECONDS)
            has_ended = service.get_patiently(job_path)["status"] in ENDED
        else:
            return


def _print(event: Json, *, is_json: bool) -> None:
    if is_json:
        show_json_line(event)
        return
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["created_at"]))
    level = event["level"]
    message = event["message"] if level == "info" else f"{level}: {event['message']}"
    print_dimmed(f"{at}  ", printable(message), STYLES.get(level, ""))
