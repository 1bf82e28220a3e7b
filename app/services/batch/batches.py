"""Creates, reads and cancels batches. All faults of an input file are reported together."""

import threading
from typing import Any

from app.auth import Principal
from app.db import batches, files
from app.db.locks import lock_project
from app.db.registry import aliases, batch_models
from app.db.schema.ids import new_id
from app.db.schema.tables import Batch, BatchStatus, File
from app.db.session import Session, transaction
from app.errors import BadRequest, Conflict, NotFound, QuotaExceeded, TooManyRequests
from app.schemas.batches import BatchError, BatchObject, CreateBatch
from app.services import model_registry
from app.services.batch.batch_input import find_faults
from app.services.jobs import (
    DUPLICATE_SECONDS,
    Accepted,
    claim,
    find_replay,
    fingerprint,
    remember,
)
from app.services.limits.budgets import demand_budget
from app.services.retries import RetryInfo
from app.settings import get_settings

ROUTE = "POST /v1/batches"
# Checking a file takes seconds, in a thread of the pool that all requests of the process share.
CHECKERS = threading.BoundedSemaphore(8)


def create_batch(principal: Principal, asked: CreateBatch, attempted: RetryInfo) -> Accepted:
    """Creates a batch, or returns the stored response if the request is a retry.

    If lines of the input file are invalid, the batch is created as failed and lists their faults.

    Raises:
        BadRequest: The request or the idempotency key is malformed.
        NotFound: The project has no such file.
        TooManyRequests: Too many input files are being checked; retry.
        QuotaExceeded: The project has too many batches that have not ended, or a budget is used up.
        Unprocessable: The idempotency key was used with another body.
        InProgress: The first request with this key is still being processed.
    """
    sha256 = fingerprint(asked.model_dump(mode="json"))
    replay = find_replay(principal, ROUTE, attempted, sha256)
    if replay is not None:
        return replay
    demand_budget(
        principal.project_id,
        principal.key_id,
        limits=principal.limits,
        project_limits=principal.project_limits,
    )
    expiry = asked.output_expires_after
    with transaction() as session:
        demand_room(session, principal.project_id)
        file = input_file(session, principal.project_id, asked.input_file_id)
    num_requests, faults, named = _check_input(file, asked.endpoint)
    with transaction() as session:
        stored = claim(session, principal, ROUTE, attempted, sha256)
        if stored is not None:
            return Accepted(stored, is_replay=True)
        columns: dict[str, Any] = {  # Any: columns of Batch, by name
            "project_id": principal.project_id,
            "endpoint": asked.endpoint,
            "batch_metadata": asked.metadata or {},
            "input_file_id": file.id,
            "output_expires_seconds": expiry.seconds if expiry else None,
        }
        lock_project(session, principal.project_id)
        if attempted.retry_count and attempted.idempotency_key is None:
            same = batches.find_recent(session, DUPLICATE_SECONDS, **columns)
            if same is not None:
                return Accepted(BatchObject.of(same).model_dump(mode="json"), is_replay=True)
        demand_room(session, principal.project_id)
        # Find the file again: it may have been deleted since. The lock prevents that from here on.
        input_file(session, principal.project_id, asked.input_file_id)
        batch = batches.insert_batch(
            session,
            id=new_id("batch_"),
            input_key=file.store_key,
            num_requests=0 if faults else num_requests,
            errors=[fault.model_dump() for fault in faults],
            created_by_key_id=principal.key_id,
            **columns,
        )
        _lock_models(session, batch, frozenset() if faults else named)
        body = BatchObject.of(batch).model_dump(mode="json")
        remember(session, principal, ROUTE, attempted, body)
    return Accepted(body, is_replay=False)


def _check_input(file: File, endpoint: str) -> tuple[int, list[BatchError], frozenset[str]]:
    """Returns the number of requests in an input file, its faults, and the models it names.

    Raises TooManyRequests, and BadRequest if the store has lost the file.
    """
    if not CHECKERS.acquire(blocking=False):
        raise TooManyRequests(
            "the input files of other batches are being checked; try again in a moment"
        )
    try:
        return find_faults(
            file.store_key,
            project_id=file.project_id,
            endpoint=endpoint,
            settings=get_settings(),
        )
    except FileNotFoundError:
        message = f"the content of the file {file.id!r} is no longer in the store; upload it again"
        raise BadRequest(message, "invalid_file", "input_file_id") from None
    finally:
        CHECKERS.release()


def _lock_models(session: Session, batch: Batch, named: frozenset[str]) -> None:
    """Locks the models and aliases that a new batch names against deletion, and records them.

    Raises NotFound if one was deleted since the input file was checked.
    """
    locked = set()
    for name in sorted(named):
        if not aliases.share_alias(session, batch.project_id, name):
            model_registry.resolve(session, batch.project_id, name, lock=True)
        match = model_registry.CHECKPOINT_PATTERN.fullmatch(name)
        locked.add(match["model"] if match else name)
    batch_models.insert_models(session, batch.id, locked)


def demand_room(session: Session, project_id: str) -> None:
    """Locks the project; raises QuotaExceeded if it has too many batches that have not ended."""
    lock_project(session, project_id)
    most = get_settings().max_active_jobs_per_project
    if batches.count_active(session, project_id) >= most:
        raise QuotaExceeded(
            f"the project has {most} batches that have not ended; wait until one has ended, or cancel one"
        )


def input_file(session: Session, project_id: str, file_id: str) -> File:
    """Returns the project's file, locked against deletion until the transaction ends.

    Raises NotFound, and BadRequest if the file has another purpose than `batch`.
    """
    row = files.find_file(session, project_id, file_id, lock=True)
    if row is None:
        message = f"the file {file_id!r} does not exist; upload it with POST /v1/files"
        raise NotFound(message, param="input_file_id")
    if row.purpose != "batch":
        message = f"the file {file_id!r} has the purpose {row.purpose}; upload it again with the purpose batch"
        raise BadRequest(message, "invalid_file", "input_file_id")
    return row


def get_batch(session: Session, project_id: str, batch_id: str) -> Batch:
    """Returns the project's batch with this id. Raises NotFound."""
    row = batches.find_batch(session, project_id, batch_id)
    if row is None:
        raise NotFound(f"the batch {batch_id!r} does not exist", param="batch_id")
    return row


def cancel_batch(project_id: str, batch_id: str) -> Batch:
    """Requests that a batch stop, which it does within seconds. Its answers so far are kept.

    Raises NotFound, and Conflict if the batch has ended or is being finalized.
    """
    with transaction() as session:
        before = get_batch(session, project_id, batch_id)
        if before.status in {BatchStatus.cancelling, BatchStatus.cancelled}:
            return before
        after = batches.request_cancel(session, batch_id)
        if after is None:
            raise Conflict(f"the batch is {before.status}; it can no longer be cancelled")
        return after
