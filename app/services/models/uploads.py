"""Receives a model as a multipart body, writes it to the store and queues its import.

The body is parsed while it arrives. The import job then checks the contents of the files, as it
does for `stillhouse models import`.
"""

import re
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Literal

import structlog
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.auth import Principal
from app.contracts.messages import ArtifactRef, ImportJob
from app.contracts.model_files import ARCHIVE, missing_from, refusal_of
from app.db import idempotency, jobs
from app.db.schema.tables import Job
from app.db.session import PoolExhausted, Session, transaction
from app.errors import BadRequest, StillhouseError, TooLarge, Unavailable
from app.multipart import PartHeaders
from app.services.files import demand_disk
from app.services.imports import COPIES, NAME
from app.services.jobs import (
    Accepted,
    demand_free_name,
    demand_room,
    find_replay,
    fingerprint,
    insert_once,
)
from app.services.retries import RetryInfo, Submitted
from app.settings import get_settings
from app.storage import StorageError, store

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # defined for type checkers only

log = structlog.get_logger(__name__)

ROUTE: Final = "POST /v1/models/imports"
MAX_FILES: Final = 1000
MAX_NAME_BYTES: Final = 64
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class ModelUpload:
    """Parser of one multipart body that writes the files of a model to the store.

    Call `feed` for each piece, then `finish`, and `close` in any case. An error in `feed` is kept
    in `fault` and raised by `finish`, so that the caller can read the whole body: some clients read
    the response only after they have sent everything.
    """

    def __init__(
        self,
        principal: Principal,
        content_type: str,
        attempted: RetryInfo,
        *,
        num_bytes: int | None,
    ) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadRequest(
                "send the model as multipart/form-data with the field name and then the parts file",
                param="file",
            )
        self.fault: StillhouseError | None = None
        self._principal, self._attempted = principal, attempted
        self._settings = get_settings()
        self._demand_space(num_bytes)
        self._name = b""
        self._is_named = False
        self._sizes: dict[str, int] = {}
        self._num_bytes = 0
        self._part, self._part_names = "", list[str]()
        self._headers = PartHeaders()
        self._is_complete = False
        self._cleanup = ExitStack()
        self._folder: Path | None = None
        self._file: IO[bytes] | None = None
        try:
            self._parser = MultipartParser(options[b"boundary"], self._callbacks())
        except FormParserError as error:
            raise malformed(error) from None

    def feed(self, piece: bytes) -> None:
        if self.fault is not None:
            return
        try:
            self._parser.write(piece)
        except FormParserError as error:
            self.fault = malformed(error)
        except StillhouseError as error:
            self.fault = error
        except OSError as error:
            self.fault = _not_written(error)
        if self.fault is not None:
            self.close()

    def finish(self, piece: bytes) -> Accepted:
        """Parses the last piece and queues the import. Returns the import, as JSON.

        Raises the error of an earlier call, or a StillhouseError if the files cannot be a model.
        """
        self.feed(piece)
        if self.fault is not None:
            raise self.fault
        if not self._is_complete:
            raise BadRequest("the multipart body is incomplete", "invalid_file", "file")
        if not self._sizes or self._folder is None:
            self._demand_name()
            raise BadRequest(
                "missing required parameter: file", "missing_required_parameter", "file"
            )
        kind = self._demand_model()
        name = self._name.decode()
        job_id = f"import-{secrets.token_hex(12)}"
        try:
            ref = store().put_folder(self._folder, f"imports/{job_id}", link=True)
        except (OSError, StorageError) as error:
            raise _not_written(error) from error
        entries = store().list_folder(ref)
        if kind != "folder":
            (entry,) = entries
            ref = ArtifactRef(
                key=f"{ref.key}/{entry['path']}", bytes=entry["bytes"], sha256=entry["sha256"]
            )
        spec = ImportJob(output_model=name, staged=ref, format=kind)
        request: dict[str, object] = {"source": "upload", "name": name, "files": entries}
        try:
            accepted = self._queue(job_id, spec, request)
        except (StillhouseError, PoolExhausted):  # raised before the commit
            store().delete(f"imports/{job_id}")
            raise
        if accepted.is_replay:
            store().delete(f"imports/{job_id}")
        return accepted

    def close(self) -> None:
        """Deletes what has been written and is not in the store. May be called more than once."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:  # flushing the buffer may fail on a full disk
                log.warning("upload_not_closed", reason=str(error))
        self._folder = None
        self._cleanup.close()

    def _queue(self, job_id: str, spec: ImportJob, request: dict[str, object]) -> Accepted:
        principal, attempted = self._principal, self._attempted
        sha256 = fingerprint(request)
        replay = find_replay(principal, ROUTE, attempted, sha256)
        if replay is not None:
            return replay

        def insert(session: Session) -> Job:
            """Inserts the job, unless the name is taken."""
            demand_free_name(session, spec.output_model)
            return jobs.insert_job(
                session,
                id=job_id,
                project_id=principal.project_id,
                kind="import",
                spec=spec.model_dump(mode="json"),
                request=request,
                model_id=spec.output_model,
                request_sha256=sha256,
                created_by_key_id=principal.key_id,
            )

        return insert_once(principal, ROUTE, attempted, Submitted(), sha256=sha256, insert=insert)

    def _demand_space(self, num_bytes: int | None) -> None:
        """Refuses a body that is larger than the limit or the free space, before it arrives."""
        if num_bytes is None:
            return
        if num_bytes > self._settings.max_import_bytes + 2**20:
            raise too_large()
        free = store().free_bytes()
        needed = COPIES * num_bytes + self._settings.min_free_bytes
        if free is not None and free < needed:
            raise Unavailable(
                f"the store has {free / 1e9:.1f} GB left; the import needs {needed / 1e9:.1f} GB",
                "insufficient_storage",
            )

    def _demand_name(self) -> None:
        """Refuses a missing, invalid or taken name, and a project with too many jobs."""
        if not self._name:
            raise BadRequest(
                "missing required parameter: name; send it before the files",
                "missing_required_parameter",
                "name",
            )
        name = self._name.decode(errors="replace")
        if not NAME.fullmatch(name):
            raise BadRequest(
                "a name has 1 to 64 of the characters a-z 0-9 . _ - and begins with a letter or digit",
                param="name",
            )
        key = self._attempted.idempotency_key
        with transaction() as session:
            if key is not None and idempotency.find_key(
                session, self._principal.project_id, ROUTE, key
            ):
                return  # a retry, whose name is that of the first attempt
            demand_room(session, self._principal.project_id)
            demand_free_name(session, name)

    def _demand_model(self) -> Literal["gguf", "archive", "folder"]:
        """Returns the format of the uploaded files. Raises BadRequest if they are no model."""
        names = list(self._sizes)
        if len(names) == 1 and names[0].endswith(".gguf"):
            return "gguf"
        if len(names) == 1 and ARCHIVE.fullmatch(names[0]):
            return "archive"
        reason = missing_from(names)
        if reason is not None:
            raise BadRequest(reason, "missing_file", "file")
        return "folder"

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            **self._headers.callbacks(),
            "on_part_begin": self._begin_part,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _end(self) -> None:
        self._is_complete = True

    def _begin_part(self) -> None:
        self._headers.clear()
        if len(self._sizes) > MAX_FILES:
            raise BadRequest(f"more than {MAX_FILES} files in the upload", "invalid_file", "file")

    def _end_headers(self) -> None:
        self._part = self._headers.option(b"name").decode(errors="replace")
        if self._part == "file":
            self._begin_file(self._headers.option(b"filename").decode(errors="replace"))
        elif self._part != "name":
            raise BadRequest(
                f"unknown parameter: {self._part[:64]}", "unknown_parameter", self._part[:64]
            )
        elif self._is_named:
            raise BadRequest("name was given twice", param="name")
        else:
            self._is_named = True

    def _begin_file(self, name: str) -> None:
        if not self._sizes:
            self._demand_name()
        if not FILE_NAME.fullmatch(name):
            raise BadRequest(
                f"the file name {name[:100]!r} is not allowed; upload the files of one folder, without a path",
                "invalid_file",
                "file",
            )
        is_single = name.endswith(".gguf") or ARCHIVE.fullmatch(name)
        reason = None if is_single else refusal_of(name)
        if reason is not None:
            raise BadRequest(reason, "unsafe_file", "file")
        if name in self._sizes:
            raise BadRequest(f"the file {name} is sent twice", "invalid_file", "file")
        if self._sizes and (is_single or any(map(_is_single, self._sizes))):
            raise BadRequest(
                "an archive or a .gguf file is uploaded alone, without other files",
                "invalid_file",
                "file",
            )
        demand_disk(self._settings)
        if self._folder is None:
            self._folder = self._cleanup.enter_context(store().staging_folder())
        self._sizes[name] = 0
        self._part_names.append(name)
        self._file = (self._folder / name).open("xb")

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "name":
            self._name += data[start:end]
            if len(self._name) > MAX_NAME_BYTES:
                raise BadRequest(f"name is longer than {MAX_NAME_BYTES} bytes", param="name")
            return
        assert self._file is not None, "`_end_headers` has opened it"
        self._num_bytes += end - start
        if self._num_bytes > self._settings.max_import_bytes:
            raise too_large()
        demand_disk(self._settings)  # for every piece: other uploads use the disk, too
        self._sizes[self._part_names[-1]] += end - start
        self._file.write(memoryview(data)[start:end])

    def _end_part(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
            if not self._sizes[self._part_names[-1]]:
                raise BadRequest(
                    f"the file {self._part_names[-1]} is empty", "invalid_file", "file"
                )


def too_large() -> TooLarge:
    """Returns the error for a model that exceeds the size limit."""
    limit = get_settings().max_import_bytes
    return TooLarge(
        f"the model is larger than {limit:,} bytes, which STILLHOUSE_MAX_IMPORT_BYTES sets",
        param="file",
    )


def malformed(error: FormParserError) -> BadRequest:
    """Returns the error for a body that is not multipart/form-data."""
    return BadRequest(f"the multipart body is malformed: {error}", "invalid_file", "file")


def _is_single(name: str) -> bool:
    return name.endswith(".gguf") or ARCHIVE.fullmatch(name) is not None


def _not_written(error: OSError | StorageError) -> Unavailable:
    log.warning("upload_not_written", reason=str(error))
    return Unavailable("the store cannot write the model now; try again later", "storage_error")
