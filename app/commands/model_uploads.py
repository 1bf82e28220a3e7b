"""Imports a model over HTTP: uploads local files, or names a model on a hub."""

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import httpx

from app.commands.remote_service import (
    RemoteError,
    RemoteService,
    json_of,
    model_path,
    refused,
    retry_after,
    unreachable,
)
from app.commands.shell import Json
from app.commands.upload_progress import CountedFile, UploadProgress
from app.contracts.model_files import ARCHIVE, IGNORED, missing_from, refusal_of
from app.model_card import CARD

NUM_TRIES: Final = 4
STORE_SECONDS: Final = 3600.0  # the response comes after the service has stored all files
RETRY_SECONDS: Final = 1.0

Tell = Callable[[str], None]


def start_import(service: RemoteService, source: str, name: str, tell: Tell) -> Json:
    """Starts the import of a folder, a .gguf file, an archive or hf:org/name@revision.

    Returns the import as the API shows it. Raises RemoteError.
    """
    if source.startswith("hf:"):
        return service.post("/v1/models/import", {"source": source, "name": name})
    files = local_files(Path(source))
    known = service.fetch(model_path(name))
    if known.status_code == 200:
        raise RemoteError(f"the name {name!r} is taken; choose another")
    if known.status_code == 401:  # a key without the scope models:read gets 403 and may upload
        raise refused(known)
    progress = UploadProgress(sum(path.stat().st_size for path in files), tell)
    # Each attempt has the same key, so a lost response does not lead to a second import.
    key = secrets.token_hex(16)
    for number in range(1, NUM_TRIES + 1):
        try:
            progress.restart()
            answer = _send(service, files, name, key, progress)
        except httpx.TransportError as error:
            if number == NUM_TRIES:
                raise unreachable(service.address, error) from error
            tell(f"the connection was lost ({type(error).__name__}); sending the files again")
            time.sleep(RETRY_SECONDS * 2**number)
            continue
        if answer.status_code not in (429, 502, 503, 504) or number == NUM_TRIES:
            break
        if answer.headers.get("x-should-retry") == "false":
            break
        time.sleep(retry_after(answer) or RETRY_SECONDS * 2**number)
    if answer.status_code != 200:
        raise refused(answer)
    return json_of(answer)


def local_files(path: Path) -> list[Path]:
    """Returns the files to upload, the smallest first. Raises RemoteError if they are no model."""
    if path.is_file() and (path.suffix == ".gguf" or ARCHIVE.fullmatch(path.name)):
        return [path]
    if not path.is_dir():
        raise RemoteError(
            f"{str(path)!r} is not a model: give a folder, a .gguf file, a tar or zip file, or hf:org/name@revision"
        )
    files = [
        file
        for file in path.iterdir()
        if file.is_file() and not file.is_symlink() and not IGNORED.fullmatch(file.name)
    ]
    for file in files:
        if (reason := refusal_of(file.name)) is not None:
            raise RemoteError(reason)
    if (reason := missing_from(file.name for file in files)) is not None:
        raise RemoteError(f"{path}: {reason}")
    readme = path / CARD  # it names the licence
    files += [readme] if readme.is_file() and not readme.is_symlink() else []
    return sorted(files, key=lambda file: file.stat().st_size)


def _send(
    service: RemoteService, files: list[Path], name: str, key: str, progress: UploadProgress
) -> httpx.Response:
    with ExitStack() as stack:
        # Any: the file types that httpx accepts
        parts: list[tuple[str, Any]] = [("name", (None, name))]
        for path in files:
            file = stack.enter_context(CountedFile(path, progress))
            parts.append(("file", (path.name, file)))
        return service.http.post(
            "/v1/models/imports",
            files=parts,
            headers={"idempotency-key": key},
            timeout=httpx.Timeout(60.0, read=STORE_SECONDS),
        )
