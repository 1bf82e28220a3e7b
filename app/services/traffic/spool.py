"""Spool of one API process: append-only files that keep records until the database has them.

A spool is a folder with a lock file and numbered segments. A segment has one JSON record per line.
The process appends records and syncs them, and deletes a segment when all its records have been
inserted. The lock ends with the process, even after a kill. Another process then adopts the folder
and inserts what is left. `app.db.schema.traffic_tables.SpoolMark` says where to begin.
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final
from uuid import uuid4

from app.fsync import sync_folder

SEGMENT_BYTES: Final = 16 * 2**20  # a larger segment is closed
SEGMENT_SECONDS: Final = 30.0  # an older segment is closed, so that its records do not stay on disk
LOCK = "lock"
SUFFIX = ".jsonl"


class SpoolFull(OSError):
    """The spool has reached its maximum size, because the database takes no records."""


class Segment:
    """File of a spool that is read from its beginning to its end.

    `number` is the position in the file of the next record to read, and `offset` its first byte.
    `size` is the length of the complete records. More may follow unless the segment is closed.
    """

    def __init__(self, path: Path, size: int = 0, *, is_closed: bool = False) -> None:
        self.path = path
        self.id = f"{path.parent.name}/{path.stem}"
        self.size = size
        self.is_closed = is_closed
        self.begun_at = time.monotonic()
        self.number = 0
        self.offset = 0

    @property
    def is_read(self) -> bool:
        return self.offset >= self.size

    def peek(self, most_records: int, most_bytes: int) -> list[bytes]:
        """Returns the next complete lines without their ends, at least one if there is one."""
        lines: list[bytes] = []
        num_bytes = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while len(lines) < most_records and self.offset + num_bytes < self.size:
                line = file.readline()
                if lines and num_bytes + len(line) > most_bytes:
                    break
                num_bytes += len(line)
                lines.append(line.removesuffix(b"\n"))
        return lines

    def advance(self, lines: Sequence[bytes]) -> None:
        """Moves past these lines, which `peek` has returned."""
        self.number += len(lines)
        self.offset += sum(len(line) + 1 for line in lines)

    def skip(self, num_records: int) -> None:
        """Moves past the first records, which an earlier process has inserted."""
        while self.number < num_records and not self.is_read:
            self.advance(self.peek(min(1000, num_records - self.number), SEGMENT_BYTES))

    def delete(self) -> None:
        """Deletes the file. It does not reappear after a power failure."""
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)


class Spool:
    """Folder with the segments of this process. `append` and the other methods are thread-safe."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._guard = threading.Lock()
        self._segments: list[Segment] = []
        self._descriptor: int | None = None
        self._lock: int | None = None
        self._folder = root / "none"

    def append(self, lines: Sequence[bytes]) -> None:
        """Appends records, each a line without its end, and syncs them.

        Raises SpoolFull or OSError. None of the records is kept then.
        """
        content = b"".join(line + b"\n" for line in lines)
        with self._guard:
            if sum(segment.size - segment.offset for segment in self._segments) > self._max_bytes:
                raise SpoolFull(f"the spool has more than {self._max_bytes:,} bytes")
            segment, descriptor = self._open_segment()
            try:
                written = memoryview(content)
                while written:
                    written = written[os.write(descriptor, written) :]
                os.fdatasync(descriptor)
            except OSError:
                os.ftruncate(descriptor, segment.size)  # a part of a record would spoil the next
                raise
            segment.size += len(content)

    def oldest(self) -> Segment | None:
        """Returns the oldest segment that has unread records or can be deleted, or None.

        Closes the newest segment if it is old and all its records have been read.
        """
        with self._guard:
            for segment in self._segments:
                if not segment.is_read or segment.is_closed:
                    return segment
                if time.monotonic() - segment.begun_at > SEGMENT_SECONDS:
                    self._close_segment()
                    return segment
        return None

    def forget(self, segment: Segment) -> None:
        """Removes a segment whose file was deleted."""
        with self._guard:
            self._segments.remove(segment)

    def close(self) -> None:
        """Closes the newest segment. No record may be appended after that."""
        with self._guard:
            self._close_segment()

    def release(self) -> None:
        """Removes the folder if it is empty, and unlocks it."""
        with self._guard:
            if self._lock is not None:
                _remove_empty(self._folder)
                os.close(self._lock)
                self._lock = None

    @property
    def num_waiting_bytes(self) -> int:
        """Size of the records that have not been read."""
        with self._guard:
            return sum(segment.size - segment.offset for segment in self._segments)

    def abandoned(self) -> Iterator["AbandonedSpool"]:
        """Yields the spools of processes that have ended, each locked by this process."""
        for folder in sorted(self._root.glob("*")) if self._root.is_dir() else ():
            if folder == self._folder or not folder.is_dir():
                continue
            lock = _lock_folder(folder)
            if lock is not None:
                yield AbandonedSpool(folder, lock)

    def _open_segment(self) -> tuple[Segment, int]:
        newest = self._segments[-1] if self._segments else None
        if newest is not None and not newest.is_closed and self._descriptor is not None:
            is_old = time.monotonic() - newest.begun_at > SEGMENT_SECONDS
            if newest.size < SEGMENT_BYTES and not is_old:
                return newest, self._descriptor
            self._close_segment()
        while self._lock is None:  # None if another process has taken the new folder as abandoned
            self._folder = self._root / uuid4().hex[:16]
            self._folder.mkdir(parents=True, mode=0o700)
            self._lock = _lock_folder(self._folder)
        path = self._folder / f"{uuid4().hex}{SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:  # the folder was removed; the next call makes another
            os.close(self._lock)
            self._lock = None
            raise
        sync_folder(self._folder)
        self._segments.append(Segment(path))
        return self._segments[-1], self._descriptor

    def _close_segment(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._segments[-1].is_closed = True


class AbandonedSpool:
    """Spool of a process that has ended. This process has its lock."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder = folder
        self._lock = lock

    def segments(self) -> list[Segment]:
        """Returns the segments. An incomplete record at the end of one is left out."""
        return [
            Segment(path, _size_of_complete_lines(path), is_closed=True)
            for path in sorted(self._folder.glob(f"*{SUFFIX}"))
        ]

    def close(self) -> None:
        """Removes the folder if all its segments have been deleted, and unlocks it."""
        _remove_empty(self._folder)
        os.close(self._lock)


def _lock_folder(folder: Path) -> int | None:
    """Returns a descriptor that locks the folder, or None if another process has the lock."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:  # another process has just removed the folder
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (folder / LOCK).stat().st_ino == os.fstat(lock).st_ino:  # the path names this file
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _remove_empty(folder: Path) -> None:
    if any(folder.glob(f"*{SUFFIX}")):
        return
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _size_of_complete_lines(path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as file:
        while size > 0:
            begin = max(0, size - 2**20)
            file.seek(begin)
            end = file.read(size - begin).rfind(b"\n")
            if end >= 0:
                return begin + end + 1
            size = begin
    return 0
