"""Downloads a model over HTTP. An interrupted download continues where it stopped.

A file is written to `NAME.part` and renamed after its SHA-256 has been verified.
"""

import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import httpx

from app.commands.remote_service import (
    RemoteError,
    RemoteService,
    model_path,
    refused,
    retry_after,
    sizes,
    unreachable,
)
from app.commands.shell import Json
from app.fsync import hash_file, sync_folder
from app.local_copies import lock_path

PART: Final = ".part"
PIECE_BYTES: Final = 2**20
MAX_FAILURES: Final = 6  # attempts in a row that bring no byte
FIRST_WAIT_SECONDS: Final = 0.5
SAFE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@:+=-]*(/[A-Za-z0-9_][A-Za-z0-9._@:+=-]*)*")
SHA256: Final = re.compile(r"[0-9a-f]{64}")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file of the model as the service lists it."""

    name: str
    num_bytes: int
    sha256: str


class Stopped(Exception):
    """Another file cannot be downloaded, so this one is not continued."""


class Pull:
    """One download of a model into a folder.

    `tell` receives lines about the progress, at most one every `line_seconds` seconds.
    """

    def __init__(
        self,
        service: RemoteService,
        target: Path,
        tell: Tell,
        *,
        num_parallel: int = 4,
        line_seconds: float = 2.0,
    ) -> None:
        self._service, self._target, self._tell = service, target, tell
        self._num_parallel, self._line_seconds = num_parallel, line_seconds
        self._guard = threading.Lock()
        self._is_stopped = threading.Event()
        self._num_done = self._num_total = self._num_received = 0
        self._began = self._told_at = time.monotonic()

    def run(self, model_id: str) -> list[RemoteFile]:
        """Downloads the model with this id, alias or checkpoint, and returns its files.

        Raises:
            RemoteError: The service refuses, fails or cannot be reached, the folder is in use, has
                other files of these names, or has too little space.
        """
        if "@" in model_id:  # an alias may move during the download
            model_id = str(self._service.get(model_path(model_id)).get("id"))
        files = read_listing(self._service.get(model_path(model_id, "files")))
        self._target.mkdir(parents=True, exist_ok=True)
        lock = lock_path(self._target, fcntl.LOCK_EX)
        if lock is None:
            raise RemoteError(
                f"another process downloads to {self._target}; wait until it has ended"
            )
        try:
            missing = [file for file in files if not self._is_complete(file)]
            self._num_total = sum(file.num_bytes for file in files)
            self._num_done = self._num_total - sum(file.num_bytes for file in missing)
            self._demand_space(missing)
            self._download_all(model_id, missing)
            for folder in {(self._target / file.name).parent for file in files}:
                sync_folder(folder)
        finally:
            os.close(lock)
        return files

    def _is_complete(self, file: RemoteFile) -> bool:
        path = self._target / file.name
        if not path.exists():
            return False
        if not path.is_file() or hash_file(path) != (file.sha256, file.num_bytes):
            raise RemoteError(
                f"{path} exists and has other content than the model; choose another folder"
            )
        return True

    def _demand_space(self, missing: list[RemoteFile]) -> None:
        needed = sum(file.num_bytes for file in missing)
        for file in missing:
            part = self._part(file)
            needed -= part.stat().st_size if part.is_file() else 0
        free = shutil.disk_usage(self._target).free
        if needed > free:
            raise RemoteError(
                f"{self._target} has {sizes(free)} of free space, and the download needs {sizes(needed)}; free some space"
            )

    def _download_all(self, model_id: str, missing: list[RemoteFile]) -> None:
        # The largest file first, because it takes longest.
        ordered = sorted(missing, key=lambda file: -file.num_bytes)
        with ThreadPoolExecutor(self._num_parallel) as pool:
            downloads = [pool.submit(self._download, model_id, file) for file in ordered]
            try:
                wait(downloads, return_when=FIRST_EXCEPTION)
            finally:  # also after Ctrl-C
                self._is_stopped.set()
                pool.shutdown(cancel_futures=True)
        errors = [
            error
            for download in downloads
            if not download.cancelled() and (error := download.exception()) is not None
        ]
        for error in errors:
            if not isinstance(error, Stopped):
                raise error

    def _download(self, model_id: str, file: RemoteFile) -> None:
        """Downloads one file, with retries, and renames it when it is verified."""
        part = self._part(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        num_failures, is_second = 0, False
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                digest = self._continue(model_id, file, part)
            except (httpx.TransportError, Unavailable) as error:
                grown = part.exists() and part.stat().st_size > before
                num_failures = 0 if grown else num_failures + 1
                if num_failures >= MAX_FAILURES:
                    raise self._failed(file, error) from error
                self._pause(error, num_failures)
                continue
            if digest == file.sha256:
                break
            part.unlink()
            self._count(-file.num_bytes)
            if is_second:
                raise RemoteError(
                    f"{file.name} has another SHA-256 than the service lists; check the store of the service"
                )
            is_second = True  # the beginning may be of an older download
        part.rename(self._target / file.name)
        self._tell(f"{file.name}: complete, {sizes(file.num_bytes)}")

    def _continue(self, model_id: str, file: RemoteFile, part: Path) -> str:
        """Downloads what is missing from the partial file, and returns the SHA-256 of it all."""
        with part.open("a+b") as out:
            digest = hashlib.sha256()
            out.seek(0)
            while piece := out.read(PIECE_BYTES):
                digest.update(piece)
            num_bytes = out.tell()
            if num_bytes > file.num_bytes:
                out.truncate(0)
                digest, num_bytes = hashlib.sha256(), 0
            self._count(num_bytes)
            try:
                if num_bytes < file.num_bytes:
                    num_bytes = self._append(model_id, file, out, digest, num_bytes)
                out.flush()
                os.fsync(out.fileno())
            except BaseException:
                self._count(-out.seek(0, os.SEEK_END))  # counted again by the next attempt
                raise
        return digest.hexdigest()

    def _append(
        self,
        model_id: str,
        file: RemoteFile,
        out: IO[bytes],
        digest: "hashlib._Hash",
        num_bytes: int,
    ) -> int:
        headers = {"accept-encoding": "identity"}
        if num_bytes:
            headers |= {"range": f"bytes={num_bytes}-", "if-range": f'"{file.sha256}"'}
        path = model_path(model_id, "files", file.name)
        with self._service.http.stream("GET", path, headers=headers) as answer:
            self._demand_success(answer, file, 206 if num_bytes else 200)
            for piece in answer.iter_raw():
                if self._is_stopped.is_set():
                    raise Stopped
                num_bytes += len(piece)
                if num_bytes > file.num_bytes:
                    raise RemoteError(
                        f"{file.name} is longer than the service lists; check the store of the service"
                    )
                out.write(piece)
                digest.update(piece)
                self._count(len(piece), is_received=True)
        if num_bytes < file.num_bytes:
            raise httpx.RemoteProtocolError("the response ended early")
        return num_bytes

    def _demand_success(self, answer: httpx.Response, file: RemoteFile, status: int) -> None:
        if answer.status_code in (429, 500, 502, 503, 504):
            raise Unavailable(answer)
        if answer.status_code >= 400:
            answer.read()
            raise refused(answer)
        etag = answer.headers.get("etag", "")
        if answer.status_code != status or etag != f'"{file.sha256}"':
            raise RemoteError(f"{file.name} has changed since it was listed; run the command again")

    def _pause(self, error: Exception, num_failures: int) -> None:
        seconds = FIRST_WAIT_SECONDS * 2**num_failures
        if isinstance(error, Unavailable):
            seconds = retry_after(error.answer) or seconds
        if self._is_stopped.wait(seconds):
            raise Stopped

    def _failed(self, file: RemoteFile, error: Exception) -> RemoteError:
        advice = "what has arrived is kept; run the command again to continue"
        if isinstance(error, Unavailable):
            return RemoteError(f"{file.name}: HTTP {error.answer.status_code}; {advice}")
        assert isinstance(error, httpx.TransportError)
        return RemoteError(f"{unreachable(self._service.address, error)} {advice}")

    def _count(self, num_bytes: int, *, is_received: bool = False) -> None:
        with self._guard:
            self._num_done += num_bytes
            self._num_received += num_bytes if is_received else 0
            now = time.monotonic()
            if not is_received or now - self._told_at < self._line_seconds:
                return
            self._told_at = now
            percent = 100 * self._num_done / max(1, self._num_total)
            rate = self._num_received / max(1e-9, now - self._began)
            line = f"{sizes(self._num_done)} of {sizes(self._num_total)} ({percent:.0f}%), {sizes(rate)}/s"
        self._tell(line)

    def _part(self, file: RemoteFile) -> Path:
        path = self._target / file.name
        return path.with_name(path.name + PART)


class Unavailable(Exception):
    """The service cannot send the file now. The only argument is its response."""

    @property
    def answer(self) -> httpx.Response:
        response: httpx.Response = self.args[0]
        return response


def read_listing(listing: Json) -> list[RemoteFile]:
    """Returns the files of a listing.

    Raises RemoteError for names that are not relative paths below the folder, or not a listing.
    """
    try:
        files = [
            RemoteFile(str(entry["name"]), int(entry["bytes"]), str(entry["sha256"]))
            for entry in listing["data"]
        ]
    except (KeyError, TypeError, ValueError):
        raise RemoteError(
            "the service does not list files; is this a Stillhouse service?"
        ) from None
    for file in files:
        is_safe = SAFE_NAME.fullmatch(file.name) and not file.name.endswith(PART)
        if not is_safe or file.num_bytes < 0 or not SHA256.fullmatch(file.sha256):
            raise RemoteError(f"the service lists the file {file.name[:100]!r}, which is refused")
    if len({file.name for file in files}) < len(files):
        raise RemoteError("the service lists a file twice")
    return files
