"""Writes the output and error files of a batch whose results can no longer change."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Final

import orjson
import structlog

from app.db import batches
from app.db.schema.ids import new_id
from app.db.schema.tables import Batch, BatchResult, BatchStatus
from app.db.session import transaction
from app.schemas.jobs import Json
from app.services.batch.batch_input import numbered_lines, parse_request
from app.settings import Settings
from app.storage import store

log = structlog.get_logger(__name__)
PAGE_ROWS: Final = 500  # results read per SQL statement, together with PAGE_BYTES
PAGE_BYTES: Final = 4 * 2**20
NEVER_RUN: Final = {
    BatchStatus.cancelled: (
        "batch_cancelled",
        "the batch was cancelled before this request was answered",
    ),
    BatchStatus.expired: ("batch_expired", "the batch expired before this request was answered"),
}


def output_line(custom_id: str, *, response: Json | None = None, error: Json | None = None) -> str:
    """Returns a line of an output or error file."""
    line = {
        "id": new_id("batch_req_"),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(line).decode()


def end_batch(batch: Batch, token: int, settings: Settings) -> bool:
    """Writes the files of a batch whose results are frozen, and ends the batch.

    Returns False, and deletes the files, if another process has the lease.
    """
    is_whole = batch.num_completed + batch.num_failed == batch.num_requests
    status = BatchStatus.completed if is_whole else BatchStatus.expired
    if batch.status == BatchStatus.cancelling:
        status = BatchStatus.cancelled
    with ExitStack() as stack:
        output = stack.enter_context(_new_file(batch, "output")) if batch.num_completed else None
        errors = (
            stack.enter_context(_new_file(batch, "error"))
            if batch.num_failed or not is_whole
            else None
        )
        for result in _results(batch):
            file = errors if result.is_error else output
            assert file is not None, "the counts are of the results"
            file.write(result.output)
        if not is_whole and errors is not None:
            _write_unanswered(batch, errors, status, settings)
    with transaction() as session:
        is_done = batches.finish(
            session,
            batch.id,
            token,
            status,
            output_file=output.columns if output else None,
            error_file=errors.columns if errors else None,
        )
    if not is_done:
        for file in filter(None, (output, errors)):
            store().delete(file.key)
    else:
        log.info("batch_ended", batch=batch.id, status=status.value)
    return is_done


class _ResultFile:
    """A JSONL file that is being written to the store."""

    def __init__(self, file: IO[bytes], key: str, file_id: str, filename: str) -> None:
        self.key = key
        self._file = file
        self._id = file_id
        self._filename = filename
        self._num_bytes = 0
        self._sha256 = hashlib.sha256()

    def write(self, line: str) -> None:
        content = line.encode() + b"\n"
        self._file.write(content)
        self._sha256.update(content)
        self._num_bytes += len(content)

    @property
    def columns(self) -> Json:
        """Columns of the file's database row, valid after the last `write`."""
        return {
            "id": self._id,
            "filename": self._filename,
            "bytes": self._num_bytes,
            "sha256": self._sha256.hexdigest(),
            "store_key": self.key,
        }


@contextmanager
def _new_file(batch: Batch, kind: str) -> Iterator[_ResultFile]:
    file_id = new_id("file-")
    key = f"files/{file_id}"
    with store().writer(key) as file:
        yield _ResultFile(file, key, file_id, f"{batch.id}_{kind}.jsonl")


def _results(batch: Batch) -> Iterator[BatchResult]:
    line = 0
    while True:
        with transaction() as session:
            rows = batches.results_after(
                session, batch.id, line, max_rows=PAGE_ROWS, max_bytes=PAGE_BYTES
            )
        yield from rows
        if not rows:
            return
        line = rows[-1].line


def _write_unanswered(
    batch: Batch, file: _ResultFile, status: BatchStatus, settings: Settings
) -> None:
    code, message = NEVER_RUN[status]
    with transaction() as session:
        answered = batches.answered_lines(session, batch.id)
    try:
        for number, raw in numbered_lines(batch.input_key, settings.max_line_bytes):
            if number not in answered:
                error = {"code": code, "message": message}
                file.write(output_line(parse_request(raw).custom_id, error=error))
    except FileNotFoundError:  # the custom_ids are lost, but the batch must end
        log.warning("batch_input_lost", batch=batch.id)
