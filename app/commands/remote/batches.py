"""`stillhouse batches`: creates, lists and cancels batches over HTTP."""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from app.commands.remote.connection import over_http
from app.commands.remote.job_body import Labels, pairs_of
from app.commands.remote.listing import After, All, Columns, Limit, Window, show_list
from app.commands.remote.output import Cell, moment, show_fields, show_json
from app.commands.shell import IsJson, Json, messages, note, tell

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

BATCHES: Final = "/v1/batches"
BatchId = Annotated[str, typer.Argument(help="Id of the batch: batch_…")]
HEADINGS = ("id", "status", "done", "failed", "endpoint", "created")

batches = typer.Typer(no_args_is_help=True, help="Batches of generation requests.")


@batches.command("create")
@over_http
def create_batch(
    service: "RemoteService",
    input_file: Annotated[
        str, typer.Argument(metavar="PATH|ID", help="Requests: a path, or a file's id.")
    ],
    endpoint: Annotated[
        str, typer.Option(help="Endpoint of all requests.")
    ] = "/v1/chat/completions",
    metadata: Labels = None,
    is_json: IsJson = False,
) -> None:
    """Creates a batch and prints its id. A file that is given as a path is uploaded first."""
    from app.commands.remote.transfers import file_id_of

    labels = pairs_of(metadata or ())
    body: Json = {
        "input_file_id": file_id_of(service, input_file, "batch"),
        "endpoint": endpoint,
        "completion_window": "24h",
    }
    batch = service.create(BATCHES, body | ({"metadata": labels} if labels else {}))
    if is_json:
        show_json(batch)
    else:
        print(batch["id"])
    if batch["status"] == "failed":
        for error in (batch["errors"] or {}).get("data", []):
            note(f"line {error['line']}: {error['message']}")
        note("stillhouse: the batch failed, because its file has invalid lines")
        raise typer.Exit(1)
    if messages.is_terminal:
        note(f"See its progress: stillhouse batches show {batch['id']}")


@batches.command("list")
@over_http
def list_batches(
    service: "RemoteService",
    limit: Limit = 20,
    after: After = None,
    is_all: All = False,
    is_json: IsJson = False,
) -> None:
    """Lists batches, newest first."""
    show_list(service, BATCHES, Window(limit, after, is_all, is_json), Columns(HEADINGS, batch_row))


@batches.command("show")
@over_http
def show_batch(service: "RemoteService", batch_id: BatchId, is_json: IsJson = False) -> None:
    """Shows a batch with its counts and the ids of its result files."""
    batch = service.get(path_of(batch_id))
    if is_json:
        show_json(batch)
    else:
        print_batch(batch)


@batches.command("cancel")
@over_http
def cancel_batch(service: "RemoteService", batch_id: BatchId, is_json: IsJson = False) -> None:
    """Cancels a batch. It keeps the answers that it has so far."""
    batch = service.post(path_of(batch_id, "cancel"))
    if is_json:
        show_json(batch)
    else:
        tell(f"{batch_id} is {batch['status']}")


def path_of(batch_id: str, *parts: str) -> str:
    """Returns the path of a batch's route."""
    from app.commands.remote_service import object_path

    return object_path(BATCHES, batch_id, *parts)


def batch_row(batch: Json) -> tuple[Cell, ...]:
    """Returns the cells of a batch in a list."""
    counts = batch["request_counts"]
    done = f"{counts['completed']}/{counts['total']}"
    created = moment(batch["created_at"])
    return (batch["id"], batch["status"], done, counts["failed"], batch["endpoint"], created)


def print_batch(batch: Json) -> None:
    """Prints the fields of a batch, and the errors in its input file."""
    counts, usage = batch["request_counts"], batch.get("usage") or {}
    show_fields(
        (
            ("id", batch["id"]),
            ("status", batch["status"]),
            ("endpoint", batch["endpoint"]),
            ("model", batch.get("model")),
            ("requests", counts["total"]),
            ("completed", counts["completed"]),
            ("failed", counts["failed"]),
            ("input tokens", usage.get("input_tokens")),
            ("output tokens", usage.get("output_tokens")),
            ("input file", batch["input_file_id"]),
            ("output file", batch["output_file_id"]),
            ("error file", batch["error_file_id"]),
            ("created", moment(batch["created_at"])),
            ("completed at", moment(batch["completed_at"])),
        )
    )
    for error in (batch["errors"] or {}).get("data", []):
        tell(f"line {error['line']}: {error['message']}")
