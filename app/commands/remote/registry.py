"""`stillhouse models show|serve|unload|pin|unpin|delete`: models of a service, over HTTP."""

import time
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from app.commands.progress_lines import ProgressLines
from app.commands.remote.connection import over_http
from app.commands.remote.output import (
    Cell,
    confirm,
    moment,
    show_fields,
    show_json,
    show_table,
)
from app.commands.shell import IsJson, Json, fail, messages, tell

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

HEADINGS: Final = ("id", "architecture", "layers", "parameters", "MB", "aliases", "owner")
WORKER_HEADINGS: Final = ("worker", "state", "weights", "MB", "load s", "first token ms")
POLL_SECONDS: Final = 0.3
# A worker that must load a model reports it in its next heartbeat, which may be late.
HEARTBEAT_SECONDS: Final = 30.0
WORKER_SECONDS: Final = 60.0  # longer than a serve worker that has died takes to start again
registry = typer.Typer()  # its commands are added to `stillhouse models`
ModelId = Annotated[str, typer.Argument(help="Id or alias of the model.")]


@registry.command("show")
@over_http
def show_model(service: "RemoteService", model: ModelId, is_json: IsJson = False) -> None:
    """Shows a model, the one an alias points at, or a checkpoint, and the workers that serve it."""
    found, status = service.get(path_of(model)), service.get(path_of(model, "status"))
    if is_json:
        show_json({**found, "status": status})
        return
    megabytes = f"{found['size_bytes'] / 1e6:,.1f}"
    serving = found.get("serving") or {}
    show_fields(
        (
            ("id", found["id"]),
            ("origin", found["origin"]),
            ("owner", found["owned_by"]),
            ("created", moment(found["created"])),
            ("start model", found["base_model"]),
            ("teacher", found.get("teacher")),
            ("job", found["job_id"]),
            ("aliases", " ".join(found.get("aliases", ()))),
            ("architecture", found.get("architecture")),
            ("layers", found.get("num_layers")),
            ("parameters", found.get("num_parameters")),
            ("context tokens", found.get("context_length")),
            ("MB", megabytes),
            ("engine", serving.get("engine")),
            ("weights", serving.get("weights")),
            ("draft", (serving.get("draft") or {}).get("model")),
            ("pinned", "yes" if status["is_pinned"] else None),
        )
    )
    if status["workers"]:
        tell("")
        show_table(WORKER_HEADINGS, map(worker_row, status["workers"]))


@registry.command("serve")
@registry.command("load", hidden=True)
@over_http
def serve_model(
    service: "RemoteService",
    model: ModelId,
    wait: Annotated[bool, typer.Option(help="Wait until the model is loaded.")] = True,
    is_json: IsJson = False,
) -> None:
    """Loads a model on the serve workers, so that its first answer comes without delay."""
    status = service.post(path_of(model, "load"))
    if not status["workers"]:
        fail("no serve worker is running; start one with `stillhouse serve-worker`")
    if status["state"] == "absent":
        fail(f"no serve worker can serve {model}; check its engine with `stillhouse models show`")
    status = until_loaded(service, model, status) if wait else status
    if status["state"] == "absent":
        fail(f"no serve worker has loaded {model}; see the log of the serve worker")
    if is_json:
        show_json(status)
    else:
        show_table(WORKER_HEADINGS, map(worker_row, status["workers"]))
    if status["state"] == "failed":
        errors = "; ".join(worker["error"] for worker in status["workers"] if worker["error"])
        fail(f"{model} cannot be loaded: {errors}")


@registry.command("unload")
@over_http
def unload_model(service: "RemoteService", model: ModelId, is_json: IsJson = False) -> None:
    """Unloads a model from all serve workers. The next request loads it again."""
    act(service, model, "unload", f"{model} is being unloaded", is_json=is_json)


@registry.command("pin")
@over_http
def pin_model(service: "RemoteService", model: ModelId, is_json: IsJson = False) -> None:
    """Keeps a model loaded on all serve workers. The key needs the scope admin."""
    act(service, model, "pin", f"{model} is pinned", is_json=is_json)


@registry.command("unpin")
@over_http
def unpin_model(service: "RemoteService", model: ModelId, is_json: IsJson = False) -> None:
    """Removes the pin of a model. The key needs the scope admin."""
    act(service, model, "unpin", f"{model} is not pinned", is_json=is_json)


@registry.command("delete")
@over_http
def delete_model(
    service: "RemoteService",
    model: Annotated[str, typer.Argument(help="Id of the model.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    is_json: IsJson = False,
) -> None:
    """Deletes a model. The service refuses while an alias, a pin, a job or a batch needs it."""
    confirm(f"Delete the model {model}? Its weights cannot be restored.", is_confirmed=yes)
    deleted = service.delete(path_of(model))
    if is_json:
        show_json(deleted)
    else:
        tell(f"Deleted {model}")


def path_of(model: str, *parts: str) -> str:
    """Returns the path of a model's route."""
    from app.commands.remote_service import model_path

    return model_path(model, *parts)


def act(service: "RemoteService", model: str, action: str, message: str, *, is_json: bool) -> None:
    """Posts an action on a model, and prints the message, or the model's state as JSON."""
    status = service.post(path_of(model, action))
    if is_json:
        show_json(status)
    else:
        tell(message)


def until_loaded(service: "RemoteService", model: str, status: Json) -> Json:
    """Returns the state of the model on the workers when none of them loads it any more.

    Exits with status 1 if no serve worker has been running for WORKER_SECONDS.
    """
    lines, began = ProgressLines(messages), time.monotonic()
    seen_at = began
    with messages.status(Text(f"Loading {model}")):
        while is_loading(status, time.monotonic() - began):
            percent = max((worker["percent"] for worker in status["workers"]), default=0.0)
            lines.tell(f"loading {model}  {percent:.0f}%")
            time.sleep(POLL_SECONDS)
            status = service.get_patiently(path_of(model, "status"))
            if status["workers"]:
                seen_at = time.monotonic()
            elif time.monotonic() - seen_at > WORKER_SECONDS:
                fail(
                    f"no serve worker has been running for {WORKER_SECONDS:.0f} s, so {model} is not "
                    "loaded; see the log of the serve worker, and run the command again"
                )
    return status


def is_loading(status: Json, seconds: float) -> bool:
    """Returns whether to wait: a worker loads the model or may be about to, or none is running."""
    states = {worker["state"] for worker in status["workers"]}
    return (
        not states or "loading" in states or (states <= {"absent"} and seconds < HEARTBEAT_SECONDS)
    )


def show_models(listing: Json, *, is_json: bool) -> None:
    """Prints a list of models as a table or as JSON."""
    if is_json:
        show_json(listing)
    else:
        show_table(HEADINGS, map(model_row, listing["data"]))


def model_row(model: Json) -> tuple[Cell, ...]:
    """Returns the cells of a model in a list."""
    return (
        model["id"],
        model["architecture"],
        model["num_layers"],
        f"{model['num_parameters'] / 1e6:,.1f} M",
        f"{model['size_bytes'] / 1e6:,.1f}",
        " ".join(model["aliases"]),
        model["owned_by"],
    )


def worker_row(worker: Json) -> tuple[Cell, ...]:
    """Returns the cells of a worker in the table of a model's state."""
    return (
        worker["worker"],
        worker["state"],
        worker["weights"],
        None if worker["bytes"] is None else f"{worker['bytes'] / 1e6:,.1f}",
        worker["load_seconds"],
        worker["first_token_ms"],
    )
