"""A folder of local copies that several processes share: locks on copies in use, and eviction of the others.

A lock is an flock on the copy itself. The kernel releases it when its process ends, also by SIGKILL.
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

    Returns a descriptor that holds the lock until it is closed; None if the path does not exist, or if
    others hold a lock that excludes this one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(descriptor).st_ino:  # not replaced since it was opened
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def use_copy(path: Path) -> int | None:
    """Locks a copy against eviction and notes that it is used now; None if it has been evicted."""
    lock = lock_path(path, fcntl.LOCK_SH)
    if lock is not None:
        os.utime(path)  # the time that `make_room` goes by
    return lock


@contextmanager
def partial_copy(folder: Path) -> Iterator[Path]:
    """A new hidden folder inside `folder` for a copy that is not complete; deleted at the end of the block.

    If this process dies, the next `make_room` deletes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        partial = folder / f".{uuid.uuid4().hex}"
        partial.mkdir()
        lock = lock_path(partial, fcntl.LOCK_EX)
        if lock is not None:
            break  # else another process took it for a leftover before it was locked
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def make_room(folder: Path, budget_bytes: int) -> None:
    """Deletes copies, the least recently used first, until the rest fits the budget; those in use stay."""
    copies, total_bytes = [], 0
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.startswith(".") and _delete_unused(path):  # left by a process that died
            continue
        with suppress(FileNotFoundError):  # evicted by another process since it was listed
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
    """Deletes a copy unless it is locked; returns whether it is gone."""
    try:
        lock = lock_path(path, fcntl.LOCK_EX)
        if lock is None:
            return False
        try:
            doomed = path.with_name(f".{uuid.uuid4().hex}")
            path.rename(doomed)  # at once gone for others, however long the deletion takes
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
