"""`stillhouse files`: uploads, lists, downloads and deletes files over HTTP."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.commands.remote.connection import over_http
from app.commands.remote.listing import After, All, Columns, Limit, Window, show_list
from app.commands.remote.output import Cell, confirm, moment, show_fields, show_json
from app.commands.remote.transfers import FILES, download_file, upload_file
from app.commands.shell import IsJson, Json, tell

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

FileId = Annotated[str, typer.Argument(help="Id of the file: file-…")]
HEADINGS = ("id", "name", "purpose", "rows", "bytes", "created")

files = typer.Typer(no_args_is_help=True, help="Uploaded files.")


@files.command("upload")
@over_http
def upload(
    service: "RemoteService",
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="File to upload.")],
    purpose: Annotated[
        str, typer.Option(help="fine-tune, distillation, batch, evals or user_data.")
    ] = "fine-tune",
    is_json: IsJson = False,
) -> None:
    """Uploads a file and prints its id. The service checks every row of a training file."""
    uploaded = upload_file(service, path, purpose)
    if is_json:
        show_json(uploaded)
    else:
        print(uploaded["id"])


@files.command("list")
@over_http
def list_files(
    service: "RemoteService",
    purpose: Annotated[str | None, typer.Option(help="Only files with this purpose.")] = None,
    limit: Limit = 20,
    after: After = None,
    is_all: All = False,
    is_json: IsJson = False,
) -> None:
    """Lists files, newest first."""
    window = Window(limit, after, is_all, is_json)
    show_list(service, FILES, window, Columns(HEADINGS, file_row), {"purpose": purpose})


@files.command("show")
@over_http
def show_file(service: "RemoteService", file_id: FileId, is_json: IsJson = False) -> None:
    """Shows the properties of a file."""
    file = service.get(path_of(file_id))
    if is_json:
        show_json(file)
        return
    counts = file.get("details") or {}
    show_fields(
        (
            ("id", file["id"]),
            ("name", file["filename"]),
            ("purpose", file["purpose"]),
            ("format", file.get("format")),
            ("rows", file.get("rows")),
            *((name.replace("_", " "), str(value)) for name, value in counts.items() if value),
            ("bytes", file["bytes"]),
            ("sha256", file.get("sha256")),
            ("created", moment(file["created_at"])),
            ("expires", moment(file["expires_at"])),
        )
    )


@files.command("download")
@over_http
def download(
    service: "RemoteService",
    file_id: FileId,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File or folder to write; default: standard output."),
    ] = None,
) -> None:
    """Downloads the content of a file and verifies its SHA-256."""
    download_file(service, file_id, output)


@files.command("delete")
@over_http
def delete_file(
    service: "RemoteService",
    file_id: FileId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    is_json: IsJson = False,
) -> None:
    """Deletes a file. The service refuses while a job or a batch needs it."""
    confirm(f"Delete the file {file_id}?", is_confirmed=yes)
    deleted = service.delete(path_of(file_id))
    if is_json:
        show_json(deleted)
    else:
        tell(f"Deleted {file_id}")


def path_of(file_id: str) -> str:
    """Returns the path of a file's route."""
    from app.commands.remote_service import object_path

    return object_path(FILES, file_id)


def file_row(file: Json) -> tuple[Cell, ...]:
    """Returns the cells of a file in a list."""
    created = moment(file["created_at"])
    name, rows = file["filename"], file.get("rows")
    return (file["id"], name, file["purpose"], rows, file["bytes"], created)
