"""Uploads, reads and deletes files of a project. Uploads are checked while they are streamed."""

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.auth import Principal
from app.db import files
from app.db.locks import lock_project
from app.db.schema.tables import File
from app.db.session import PoolExhausted, Session, transaction
from app.errors import (
    BadRequest,
    Conflict,
    NotFound,
    QuotaExceeded,
    StillhouseError,
    TooLarge,
    Unavailable,
)
from app.multipart import PartHeaders
from app.services.training_rows import RowChecker
from app.settings import Settings
from app.storage import store

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # defined for type checkers only

log = structlog.get_logger(__name__)

TRAINING_PURPOSES = frozenset({"fine-tune", "distillation"})
PURPOSES = ("fine-tune", "distillation", "evals", "batch", "user_data")
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
MAX_PARTS = 8
MAX_FIELD_BYTES = 1024
EXPIRY_SECONDS = range(3600, 2_592_000 + 1)  # 1 hour to 30 days, as in the OpenAI API
READ_BYTES = 256 * 1024


class Upload:
    """Parser of one multipart body that writes its file into the store.

    Call `feed` for each piece, then `finish`, or `abandon` to discard the file. An error in `feed`
    is kept in `fault` and raised by `finish`. The caller can thus read the whole body, for clients
    that read the response only after they have sent everything.
    """

    def __init__(self, principal: Principal, content_type: str, settings: Settings) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadRequest(
                "send the file as multipart/form-data with the parts file and purpose", param="file"
            )
        self.id = f"file-{secrets.token_hex(12)}"
        self.store_key = f"files/{self.id}"
        self.fault: StillhouseError | None = None
        self._principal = principal
        self._settings = settings
        self._checker = RowChecker(settings.max_line_bytes, settings.max_rows_per_file)
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0
        self._num_parts = 0
        self._is_complete = False
        self._fields: dict[str, bytes] = {}
        self._filename: str | None = None
        self._part = ""
        self._headers = PartHeaders()
        self._cleanup = ExitStack()
        self._file: Any = None  # Any: the store's writable file
        try:
            self._parser = MultipartParser(options[b"boundary"], self._callbacks())
        except FormParserError as error:
            raise BadRequest(f"the multipart body is malformed: {error}", param="file") from None

    def feed(self, piece: bytes) -> None:
        if self.fault is not None:
            return
        try:
            self._parser.write(piece)
        except FormParserError as error:
            self.fault = BadRequest(
                f"the multipart body is malformed: {error}", "invalid_file", "file"
            )
        except StillhouseError as error:
            self.fault = error
        except OSError as error:
            self.fault = _not_written(error)
        if self.fault is not None:
            self.abandon()

    def finish(self) -> File:
        """Registers the file and returns its row. On an error, discards the file and raises it."""
        try:
            if self.fault is None:
                return self._finish()
        except StillhouseError as error:
            self.fault = error
        except OSError as error:
            self.fault = _not_written(error)
        except BaseException:
            self.abandon()
            raise
        self.abandon()
        raise self.fault

    def abandon(self) -> None:
        """Discards the bytes that were written. May be called more than once."""
        if self._file is not None:
            self._file = None
            with suppress(OSError):  # flushing the buffer may fail on a full disk
                self._cleanup.__exit__(BadRequest, BadRequest("abandoned"), None)

    def _finish(self) -> File:
        if not self._is_complete:
            raise BadRequest("the multipart body is incomplete", "invalid_file", "file")
        if self._filename is None or self._file is None:
            raise BadRequest(
                "missing required parameter: file", "missing_required_parameter", "file"
            )
        purpose = self._purpose()
        expires_at = self._expires_at()
        self._checker.close()
        is_training = purpose in TRAINING_PURPOSES
        if is_training:
            self._checker.raise_fault()
        elif self._num_bytes == 0:
            raise BadRequest("the file is empty", "invalid_file", "file")
        self._file = None
        self._cleanup.close()  # publishes the file: its bytes are durable
        try:
            with transaction() as session:
                lock_project(session, self._principal.project_id)
                _demand_room(session, self._principal.project_id, self._num_bytes, self._settings)
                return files.insert_file(
                    session,
                    id=self.id,
                    project_id=self._principal.project_id,
                    filename=self._filename,
                    purpose=purpose,
                    bytes=self._num_bytes,
                    sha256=self._sha256.hexdigest(),
                    store_key=self.store_key,
                    format=self._checker.format if is_training else None,
                    num_rows=self._checker.num_rows if is_training else None,
                    max_row_bytes=self._checker.max_row_bytes if is_training else None,
                    details=self._checker.details.as_json() if is_training else None,
                    expires_at=expires_at,
                )
        except (StillhouseError, PoolExhausted):
            # These errors are raised before the commit, so the row does not exist. After any other
            # error it may exist; if not, app.services.garbage_collector deletes the bytes later.
            store().delete(self.store_key)
            raise

    def _purpose(self) -> str:
        if "purpose" not in self._fields:
            raise BadRequest(
                "missing required parameter: purpose", "missing_required_parameter", "purpose"
            )
        purpose = self._fields["purpose"].decode(errors="replace")
        if purpose not in PURPOSES:
            raise BadRequest(
                f"invalid value for purpose: choose from {', '.join(PURPOSES)}", param="purpose"
            )
        return purpose

    def _expires_at(self) -> datetime | None:
        if not self._fields.keys() & set(FIELDS[1:]):
            return None
        anchor, seconds = (
            self._fields.get(name, b"").decode(errors="replace") for name in FIELDS[1:]
        )
        if anchor != "created_at":
            raise BadRequest(
                "expires_after.anchor must be created_at", param="expires_after.anchor"
            )
        if not (
            seconds.isascii()
            and seconds.isdigit()
            and len(seconds) < 9
            and int(seconds) in EXPIRY_SECONDS
        ):
            raise BadRequest(
                "expires_after.seconds must be between 3600 and 2592000",
                param="expires_after.seconds",
            )
        return datetime.now(UTC) + timedelta(seconds=int(seconds))

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            **self._headers.callbacks(),
            "on_part_begin": self._begin_part,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take_data,
            "on_end": self._end,
        }

    def _end(self) -> None:
        self._is_complete = True

    def _begin_part(self) -> None:
        self._num_parts += 1
        self._headers.clear()
        if self._num_parts > MAX_PARTS:
            raise BadRequest(f"more than {MAX_PARTS} parts in the multipart body", "invalid_file")

    def _end_headers(self) -> None:
        self._part = self._headers.option(b"name").decode(errors="replace")
        if self._part == "file":
            if self._filename is not None:
                raise BadRequest(
                    "more than one part is named file; upload one file per request", param="file"
                )
            self._filename = _label(self._headers.option(b"filename"))
            demand_disk(self._settings)
            # The quota is checked before the upload, and again in `_finish`.
            with transaction() as session:
                _demand_room(session, self._principal.project_id, 0, self._settings)
            self._file = self._cleanup.enter_context(store().writer(self.store_key))
        elif self._part not in FIELDS:
            raise BadRequest(
                f"unknown parameter: {self._part[:64]}", "unknown_parameter", self._part[:64]
            )
        elif self._part in self._fields:
            raise BadRequest(f"{self._part} was given twice", param=self._part)
        else:
            self._fields[self._part] = b""

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part != "file":
            self._fields[self._part] += piece
            if len(self._fields[self._part]) > MAX_FIELD_BYTES:
                raise BadRequest(f"{self._part} is too long", param=self._part)
            return
        self._num_bytes += len(piece)
        if self._num_bytes > self._settings.max_file_bytes:
            raise too_large(self._settings)
        demand_disk(self._settings)  # for every piece: other uploads use the disk, too
        self._sha256.update(piece)
        self._file.write(piece)
        purpose = self._fields.get("purpose", b"fine-tune").decode(errors="replace")
        if purpose in TRAINING_PURPOSES:
            self._checker.feed(piece)
        if "purpose" in self._fields and purpose in TRAINING_PURPOSES:
            self._checker.raise_fault()


def demand_disk(settings: Settings) -> None:
    """Raises Unavailable if the store has less free space than the reserve in the settings."""
    free = store().free_bytes()
    if free is not None and free < settings.min_free_bytes:
        raise Unavailable(
            "the store is full; delete files or models, or try again later", "insufficient_storage"
        )


def _not_written(error: OSError) -> Unavailable:
    log.warning("upload_not_written", reason=str(error))
    return Unavailable("the store cannot write the file now; try again later", "storage_error")


def too_large(settings: Settings) -> TooLarge:
    """Returns the error for a file that exceeds the size limit."""
    return TooLarge(
        f"the file is larger than {settings.max_file_bytes:,} bytes; split it", param="file"
    )


def _label(raw: bytes) -> str:
    """Returns the client's name of a file, cleaned for display. It is never used as a path."""
    name = raw.decode(errors="replace").replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in name if c.isprintable())[:255] or "upload"


def _demand_room(
    session: Session, project_id: str, num_more_bytes: int, settings: Settings
) -> None:
    num_files, num_bytes = files.count_files(session, project_id)
    if num_files >= settings.max_files_per_project:
        raise QuotaExceeded(
            f"the project already has {num_files:,} files, the most that are allowed; delete some"
        )
    if num_bytes + num_more_bytes > settings.max_bytes_per_project:
        raise QuotaExceeded(
            f"the project's files have {num_bytes:,} bytes of {settings.max_bytes_per_project:,} allowed; delete some files"
        )


def get_file(project_id: str, file_id: str) -> File:
    """Returns the project's file with this id. Raises NotFound."""
    with transaction() as session:
        row = files.find_file(session, project_id, file_id)
    if row is None:
        raise NotFound(f"the file {file_id!r} does not exist", param="file_id")
    return row


def delete_file(project_id: str, file_id: str) -> None:
    """Deletes the row of a file and then its bytes.

    Raises NotFound, and Conflict if a job or batch that has not ended reads the file.
    """
    with transaction() as session:
        row = files.find_file(session, project_id, file_id)
        # Delete first: this waits for a transaction that is queueing a job or batch with the file.
        # The query below then sees that job or batch, and Conflict rolls the deletion back.
        if row is None or not files.delete_file(session, project_id, file_id):
            raise NotFound(f"the file {file_id!r} does not exist", param="file_id")
        users = files.readers_of_file(session, project_id, file_id)
        if users:
            raise Conflict(
                f"the file {file_id!r} is in use by {', '.join(users)}",
                "resource_in_use",
                "file_id",
            )
    store().delete(row.store_key)


def read_content(row: File) -> Iterator[bytes]:
    """Returns an iterator over the bytes of a file, in pieces.

    Raises NotFound at once, not at the first piece, if the store has lost the file.
    """
    if not store().exists(row.store_key):
        raise NotFound(
            f"the content of the file {row.id!r} is no longer in the store; upload it again",
            param="file_id",
        )
    return _pieces(row.store_key)


def _pieces(store_key: str) -> Iterator[bytes]:
    with store().open(store_key) as file:
        while piece := file.read(READ_BYTES):
            yield piece
