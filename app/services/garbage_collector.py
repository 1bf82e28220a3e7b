"""Garbage collector: deletes what is past its retention, and stored objects without a database row.

A round may be interrupted at any point. The next round deletes what is left.
"""

from contextlib import suppress
from typing import Final

import structlog

from app.db import jobs, reconciliation, submissions
from app.db.session import transaction
from app.services.traffic.retention import delete_unretained
from app.services.webhooks.retention import delete_old_events
from app.storage import StorageError, Store

log = structlog.get_logger(__name__)

DAY_SECONDS: Final = 86_400.0  # longer than any upload or copy takes
CHECKPOINTS, MODELS, IMPORTS, FILES = "checkpoints", "models", "imports", "files"
NUM_NAMES: Final = 500  # job ids or store keys per SQL statement


def collect(store: Store) -> int:
    """Runs one round over stored completions, events and the store; returns how much it deleted.

    Steps that need only the database come first, so that they run while the store is down.
    """
    num_deleted = delete_unretained() + delete_old_events()
    num_deleted += _delete_retired(store) + _delete_expired(store)
    num_deleted += sum(_delete_of_jobs(store, prefix) for prefix in (CHECKPOINTS, MODELS))
    num_deleted += _delete_spent_imports(store) + _delete_unknown_files(store)
    _forget_deleted_jobs(store)
    return num_deleted + store.sweep_incoming(DAY_SECONDS)


def _delete_retired(store: Store) -> int:
    with transaction() as session:
        doomed = reconciliation.mark_unneeded_checkpoints(session)
    gone = [checkpoint_id for checkpoint_id, key in doomed if _delete(store, key)]
    with transaction() as session:  # last, because the rows record which bytes are left to delete
        reconciliation.forget_checkpoints(session, gone)
    return len(gone)


def _delete_expired(store: Store) -> int:
    with transaction() as session:
        keys = reconciliation.forget_expired_files(session)
        reconciliation.forget_expired_keys(session)
        submissions.forget_old(session)
        jobs.fold_counts(session)
    return sum(_delete(store, key) for key in keys)


def _delete_of_jobs(store: Store, prefix: str) -> int:
    """Deletes objects below `prefix/{job}` that no database row refers to.

    Lost leases, failures and deletions leave such objects. The store is listed before the rows
    are read, so objects that a run adds in the meantime are not considered.
    """
    listed = {}
    for job_id in store.children(prefix):
        try:
            listed[job_id] = _below(store, f"{prefix}/{job_id}")
        except OSError:
            log.exception("garbage_not_listed", key=f"{prefix}/{job_id}")
    num_deleted = 0
    for batch in _batches(list(listed)):
        with transaction() as session:
            stored = reconciliation.stored_jobs(session, batch)
        for job_id, job in stored.items():
            root = f"{prefix}/{job_id}"
            for key in _garbage_of(root, listed[job_id], job, is_fenced=prefix == CHECKPOINTS):
                num_deleted += _delete(store, key)
    return num_deleted


def _below(store: Store, key: str) -> dict[str, list[str]]:
    """Returns the names directly below a job's folder, each with the names below it."""
    return {name: store.children(f"{key}/{name}") for name in store.children(key)}


def _garbage_of(
    root: str, below: dict[str, list[str]], job: reconciliation.StoredJob, *, is_fenced: bool
) -> list[str]:
    """Returns the keys at or below `root` that are no longer needed.

    `root` itself is returned only if no attempt can write there any more. A failed job may be
    resumed at any time.

    is_fenced: The paths below `root` contain the lease token, so only the folder of the current
        token can still grow. If False, nothing is garbage before the job has ended.
    """
    is_model_kept = not is_fenced and any(
        key == root or key.startswith(f"{root}/") for key in job.kept_keys
    )
    if job.is_discarded and not is_model_kept:
        return [root]
    if root in job.kept_keys or not (is_fenced or job.has_ended):
        return []
    kept = [key for key in job.kept_keys if key.startswith(f"{root}/")]
    if not kept and not job.can_run_again:
        return [root]
    garbage = []
    for name, children in below.items():
        key = f"{root}/{name}"
        if name == str(job.lease_token) or key in kept:
            continue
        if any(other.startswith(f"{key}/") for other in kept):
            garbage += [f"{key}/{child}" for child in children if f"{key}/{child}" not in kept]
        else:
            garbage.append(key)
    return garbage


def _forget_deleted_jobs(store: Store) -> None:
    """Removes the rows of jobs that were deleted a day ago and have nothing left in the store.

    A stale worker may write after the deletion, and `_delete_of_jobs` finds its objects only as
    long as the job has a row.
    """
    with transaction() as session:
        deleted = reconciliation.deleted_jobs(session, DAY_SECONDS)
    emptied = [
        job_id
        for job_id in deleted
        if not any(store.exists(f"{prefix}/{job_id}") for prefix in (CHECKPOINTS, MODELS))
    ]
    if emptied:
        with transaction() as session:
            reconciliation.forget_jobs(session, emptied)


def _delete_spent_imports(store: Store) -> int:
    names = store.children(IMPORTS)
    if not names:
        return 0
    with transaction() as session:
        spent = {
            key.split("/")[1]
            for key in reconciliation.spent_imports(session)
            if key.startswith(f"{IMPORTS}/")
        }
        known = reconciliation.stored_jobs(session, names)
    # An API process that ended between storing an upload and queueing its job leaves such a folder.
    left = {name for name in names if name not in known and _is_old(store, f"{IMPORTS}/{name}")}
    return sum(_delete(store, f"{IMPORTS}/{name}") for name in names if name in spent | left)


def _is_old(store: Store, folder: str) -> bool:
    """Returns whether all files in a folder are older than any upload takes."""
    try:
        files = [f"{folder}/{name}" for name in store.children(folder)]
        return all(store.age_seconds(key) > DAY_SECONDS for key in files)
    except OSError:  # deleted since the listing
        return False


def _delete_unknown_files(store: Store) -> int:
    num_deleted = 0
    for batch in _batches([f"{FILES}/{name}" for name in store.children(FILES)]):
        with transaction() as session:
            unknown = reconciliation.unknown_files(session, batch)
        for key in sorted(unknown):
            with suppress(FileNotFoundError):  # deleted since the listing
                if store.age_seconds(key) > DAY_SECONDS:
                    num_deleted += _delete(store, key)
    return num_deleted


def _delete(store: Store, key: str) -> bool:
    """Deletes a key and returns whether it succeeded. Errors are logged, and the round goes on."""
    try:
        store.delete(key)
    except (OSError, StorageError):
        log.exception("garbage_not_deleted", key=key)
        return False
    return True


def _batches(names: list[str]) -> list[list[str]]:
    return [names[start : start + NUM_NAMES] for start in range(0, len(names), NUM_NAMES)]
