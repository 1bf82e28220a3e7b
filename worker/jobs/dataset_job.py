"""Input and output of a job that makes a data set: stored completions in, files out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import orjson

from app.contracts.datasets import DatasetJob, Side
from app.contracts.messages import ArtifactRef
from app.crash_points import crash_point
from app.db.schema.ids import new_id
from app.db.schema.traffic_tables import StoredCompletion
from app.db.session import transaction
from app.db.traffic import completions, datasets
from app.db.traffic.completions import CompletionFilter, Place
from app.storage import store
from worker.jobs.lease_client import Lease, demand_outcome, retry_on_disconnect
from worker.protocol.run_lines import DatasetLine

PAGE_ROWS: Final = 500
PAGE_BYTES: Final = 8 * 2**20
RECORDS: Final = "records.jsonl"
R = TypeVar("R")
Json = dict[str, Any]  # Any: the public report


class Write(Protocol):
    """Callable that repeats a call while the database is away, and checks the lease before."""

    def __call__(self, call: Callable[..., R], /, *args: object) -> R: ...


@dataclass(frozen=True)
class StoredFile:
    """File of a data set that is in the store. `columns` are those of its row in `files`."""

    side: Side
    columns: Json


def export_records(lease: Lease, job: DatasetJob, folder: Path, write: Write) -> Path:
    """Writes the completions that the job selects to a file, newest first, and returns its path."""
    folder.mkdir(parents=True, mode=0o700)
    path = folder / RECORDS
    wanted = CompletionFilter.of(job.records)
    before: Place | None = None
    num_left, bytes_left = job.options.limit, job.max_bytes
    with path.open("wb") as file:
        while num_left > 0 and bytes_left > 0:
            limit = min(PAGE_ROWS, num_left)
            rows = write(_page, lease, wanted, before, limit, min(PAGE_BYTES, bytes_left))
            if not rows:
                break
            before = (rows[-1].created_at, rows[-1].id)
            for row in rows:
                file.write(_record(row) + b"\n")
                bytes_left -= row.bytes
            num_left -= len(rows)
    return path


def store_files(folder: Path, line: DatasetLine, name: str) -> list[StoredFile]:
    """Stores the files that the run names and returns them.

    If no row is inserted for a stored file, the garbage collector deletes it later.
    """
    files = []
    for built in line.files:
        file_id = new_id("file-")
        ref: ArtifactRef = store().put_file(folder / built.name, f"files/{file_id}")
        columns = {
            "id": file_id,
            "filename": f"{name}-{built.name}"[-255:],
            "purpose": "fine-tune",
            "bytes": ref.bytes,
            "sha256": ref.sha256,
            "store_key": ref.key,
            "format": "chat",
            "num_rows": built.num_rows,
            "max_row_bytes": built.max_row_bytes,
        }
        files.append(StoredFile(built.side, columns))
    return files


@retry_on_disconnect
def finish(lease: Lease, files: Sequence[StoredFile], report: Json) -> bool:
    """Registers the files and ends the job, in one transaction.

    Returns False if the job was cancelled. No row refers to the files then. Raises LeaseLost.
    """
    ids = {file.side: file.columns["id"] for file in files}
    result = {"files": ids, "report": report}
    crash_point("dataset.begun")
    with transaction() as session:
        job = datasets.finish_dataset(
            session,
            lease.job_id,
            lease.token,
            files=[file.columns for file in files],
            result=result,
        )
        crash_point("dataset.inside")
        if job is None:
            return demand_outcome(session, lease, "succeeded")
        is_complete = bool(job.result_file_ids)
    crash_point("dataset.finished")
    return is_complete


@retry_on_disconnect
def _page(
    lease: Lease, wanted: CompletionFilter, before: Place | None, limit: int, most_bytes: int
) -> list[StoredCompletion]:
    with transaction() as session:
        return completions.page_before(
            session,
            lease.project_id or "",
            wanted,
            before=before,
            limit=limit,
            most_bytes=most_bytes,
        )


def _record(row: StoredCompletion) -> bytes:
    return orjson.dumps(
        {
            "id": row.id,
            "model": row.model,
            "created_at": row.created_at.timestamp(),
            "prompt_tokens": row.prompt_tokens,
            "completion_tokens": row.completion_tokens,
            "messages": orjson.Fragment(row.messages),
            "request": orjson.Fragment(row.request),
            "completion": orjson.Fragment(row.completion),
        }
    )
