"""Deletes what no row refers to any more. Killed at any point, the next round finds the rest."""

from contextlib import suppress
from typing import Final

import structlog

from app.db import jobs, reconciliation, submissions
from app.db.session import transaction
from app.storage import StorageError, Store

log = structlog.get_logger(__name__)

DAY_SECONDS: Final = 86_400.0  # an upload or a copy may be under way for less than this
CHECKPOINTS, MODELS, IMPORTS, FILES = "checkpoints", "models", "imports", "files"
NUM_NAMES: Final = 500  # store names looked up in one statement


def collect(store: Store) -> int:
    """One round over the whole store; says how many things it deleted."""
    num_deleted = _delete_retired(store) + _delete_expired(store)
    num_deleted += sum(_delete_of_jobs(store, prefix) for prefix in (CHECKPOINTS, MODELS))
    num_deleted += _delete_spent_imports(store) + _delete_unknown_files(store)
    _forget_deleted_jobs(store)
    return num_deleted + store.sweep_incoming(DAY_SECONDS)


def _delete_retired(store: Store) -> int:
    with transaction() as session:
        doomed = reconciliation.doom_checkpoints(session)
    gone = [checkpoint_id for checkpoint_id, key in doomed if _delete(store, key)]
    with transaction() as session:  # the rows last: without them nobody would know the bytes
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
    """Deletes objects below `prefix/{job}` that no row names: left by lost leases, failures and deletions.

    The store is listed before the rows are read, so what a run adds meanwhile is not considered.
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
    """Names two levels below a job's folder."""
    return {name: store.children(f"{key}/{name}") for name in store.children(key)}


def _garbage_of(
    root: str, below: dict[str, list[str]], job: reconciliation.StoredJob, *, is_fenced: bool
) -> list[str]:
    """Keys at or below `root` that nobody will ever ask for.

    is_fenced: the paths below contain the lease token, so only the current token's folder can still grow.
    Without it nothing is garbage before the job has ended.
    `root` itself is garbage only if no attempt can write there any more: a failed job may be resumed at any time.
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
    """Removes the rows of deleted jobs, a day later, so that what a late writer leaves is still found by them."""
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
    return sum(_delete(store, f"{IMPORTS}/{name}") for name in names if name in spent)


def _delete_unknown_files(store: Store) -> int:
    num_deleted = 0
    for batch in _batches([f"{FILES}/{name}" for name in store.children(FILES)]):
        with transaction() as session:
            unknown = reconciliation.unknown_files(session, batch)
        for key in sorted(unknown):
            with suppress(FileNotFoundError):  # deleted since it was listed
                if store.age_seconds(key) > DAY_SECONDS:
                    num_deleted += _delete(store, key)
    return num_deleted


def _delete(store: Store, key: str) -> bool:
    """Deletes a key and returns whether it is gone; an error is logged, so that the round goes on."""
    try:
        store.delete(key)
    except (OSError, StorageError):
        log.exception("garbage_not_deleted", key=key)
        return False
    return True


def _batches(names: list[str]) -> list[list[str]]:
    return [names[start : start + NUM_NAMES] for start in range(0, len(names), NUM_NAMES)]
