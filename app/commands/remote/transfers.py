"""Uploads and downloads of the files of the API."""

import hashlib
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import typer

from app.commands.shell import Json, note

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

FILES: Final = "/v1/files"
ID_PREFIX: Final = "file-"
STORE_SECONDS: Final = 600.0  # the response comes after the service has checked all rows
PIECE_BYTES: Final = 2**20


def file_id_of(service: "RemoteService", path_or_id: str, purpose: str) -> str:
    """Returns the id of an uploaded file. A path is uploaded first. Raises RemoteError."""
    path = Path(path_or_id)
    try:
        is_file = path.is_file()
    except OSError as error:  # for example, the name is too long or a folder cannot be read
        raise typer.BadParameter(f"cannot read {path_or_id!r}: {error.strerror}") from error
    if is_file:
        return str(upload_file(service, path, purpose)["id"])
    if path_or_id.startswith(ID_PREFIX):
        return path_or_id
    raise typer.BadParameter(f"{path_or_id!r} is neither a file nor the id of an uploaded one")


def upload_file(service: "RemoteService", path: Path, purpose: str) -> Json:
    """Uploads a file and returns it as the API shows it. Raises RemoteError."""
    import httpx

    from app.commands.remote_service import RemoteError, json_of, refused, unreachable
    from app.commands.upload_progress import CountedFile, UploadProgress

    try:
        num_bytes = path.stat().st_size
        file = CountedFile(path, UploadProgress(num_bytes, note))
    except OSError as error:
        raise typer.BadParameter(f"cannot read {str(path)!r}: {error.strerror}") from error
    with file:
        try:
            answer = service.http.post(
                FILES,
                data={"purpose": purpose},
                files={"file": (path.name, file)},
                timeout=httpx.Timeout(60.0, read=STORE_SECONDS),
            )
        except httpx.RequestError as error:
            raise unreachable(service.address, error) from error
        except OSError as error:
            raise RemoteError(f"cannot read {path}: {error.strerror}") from error
    if not answer.is_success:
        raise refused(answer)
    uploaded = json_of(answer)
    note(f"Uploaded {path.name} as {uploaded['id']}")
    return uploaded


def download_file(service: "RemoteService", file_id: str, target: Path | None) -> None:
    """Downloads a file to a path that does not exist yet, or to standard output.

    The file is written to `NAME.part` and renamed after its SHA-256 has been verified.

    Raises RemoteError.
    """
    from app.commands.remote_service import RemoteError, object_path

    file = service.get(object_path(FILES, file_id))
    if target is None:
        digest = _copy(service, file_id, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        _demand_digest(file, digest)
        return
    try:
        if target.is_dir():
            target /= file["filename"].rpartition("/")[2] or file_id
        if target.exists():
            raise RemoteError(f"{target} exists; choose another path, or delete it")
        part = target.with_name(target.name + ".part")
        with part.open("wb") as out:
            digest = _copy(service, file_id, out)
            os.fsync(out.fileno())
        _demand_digest(file, digest)
        part.rename(target)
    except (OSError, ValueError) as error:  # ValueError: the name has a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise RemoteError(f"cannot write {target}: {reason}") from error
    note(f"Downloaded {file_id} to {target}")


def _demand_digest(file: Json, digest: str) -> None:
    from app.commands.remote_service import RemoteError

    if digest != file.get("sha256", digest):
        raise RemoteError(f"{file['id']} has another SHA-256 than the service lists; try again")


def _copy(service: "RemoteService", file_id: str, out: IO[bytes]) -> str:
    """Writes the content of a file, and returns its SHA-256."""
    import httpx

    from app.commands.remote_service import object_path, refused, unreachable

    digest = hashlib.sha256()
    try:
        with service.http.stream("GET", object_path(FILES, file_id, "content")) as answer:
            if not answer.is_success:
                answer.read()
                raise refused(answer)
            for piece in answer.iter_bytes(PIECE_BYTES):
                digest.update(piece)
                out.write(piece)
    except httpx.RequestError as error:
        raise unreachable(service.address, error) from error
    return digest.hexdigest()
