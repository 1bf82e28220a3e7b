"""Locks and eviction for a folder of local copies that several processes share.

A lock is an flock on the copy itself. The kernel releases it when the process ends, even if the
process is killed.
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)


def lock_path(path: Path, kind: int) -> int | None:
    """Locks a file or a folder with `fcntl.LOCK_SH` or `LOCK_EX`, without waiting.

    Returns a file descriptor that holds the lock until it is closed. Returns None if the path does
    not exist, or if a conflicting lock is held.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(descriptor).st_ino:  # path still names the locked file
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def use_copy(path: Path) -> int | None:
    """Locks a copy against eviction and updates its time of last use.

    Returns a file descriptor that holds the lock until it is closed, or None if the copy has been
    evicted.
    """
    lock = lock_path(path, fcntl.LOCK_SH)
    if lock is not None:
        os.utime(path)  # `make_room` evicts by modification time
    return lock


@contextmanager
def partial_copy(folder: Path) -> Iterator[Path]:
    """Yields a new hidden folder inside `folder` for an incomplete copy, and deletes it afterwards.

    If this process dies, the next `make_room` deletes the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        partial = folder / f".{uuid.uuid4().hex}"
        partial.mkdir()
        lock = lock_path(partial, fcntl.LOCK_EX)
        if lock is not None:
            break  # otherwise `make_room` of another process is deleting it as a leftover
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def make_room(folder: Path, budget_bytes: int) -> None:
    """Deletes copies, least recently used first, until the rest fits the budget.

    Copies in use are kept. Incomplete copies of processes that have died are always deleted.
    """
    copies, total_bytes = [], 0
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.startswith(".") and _delete_unused(path):  # its process has died
            continue
        with suppress(FileNotFoundError):  # another process has evicted it
            used_at, num_bytes = path.stat().st_mtime, _num_bytes(path)
            total_bytes += num_bytes
            copies.append((used_at, num_bytes, path))
    for used_at, num_bytes, path in sorted(copies):
        if total_bytes <= budget_bytes:
            return
        if _delete_unused(path):
            total_bytes -= num_bytes
            idle_seconds = round(time.time() - used_at)
            log.info("copy_evicted", copy=path.name, num_bytes=num_bytes, idle_seconds=idle_seconds)


def _delete_unused(path: Path) -> bool:
    """Deletes a copy unless it is in use. Returns whether it was deleted."""
    try:
        lock = lock_path(path, fcntl.LOCK_EX)
        if lock is None:
            return False
        try:
            doomed = path.with_name(f".{uuid.uuid4().hex}")
            path.rename(doomed)  # hides it from other processes during the deletion
            shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
        finally:
            os.close(lock)
    except OSError:
        log.exception("copy_not_deleted", copy=path.name)
        return False
    return True


def _num_bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(
        os.lstat(os.path.join(root, name)).st_size
        for root, _, names in os.walk(path)
        for name in names
    )
