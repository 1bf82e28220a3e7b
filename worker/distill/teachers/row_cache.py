"""Teacher rows on disk: one folder per cache, named by hashes of all that determines its content.

- `rows.bin` holds the data of each row, a blob of fixed size.
- `index.bin` begins with a checksum, followed by the name and the blob size of each row.
- `marks.bin` holds eight bytes per row: zero, or a flag bit and the CRC-32 of the blob.

A blob is valid only if its mark matches. A killed run, a lost page or a flipped bit therefore costs
a recomputation, but never gives a wrong row. Space is reserved at creation, so that a full disk is
noticed then and not during a run.

Several runs may fill one cache at once, since all write the same bytes. Rows that one of them kept
from answers differ by rounding from those that another computes; whichever is whole is valid. A new cache copies matching
rows from other caches of its family: those of the same teacher, format and device, for other lists
of rows.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import struct
import time
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from app.local_copies import lock_path
from worker.disk import is_disk_full

MARK_BYTES = 8
NAME_BYTES = 16
RECORD = struct.Struct(f"<{NAME_BYTES}sQ")  # entry of the index: name, blob size
MARK_FLAG = 1 << 32  # distinguishes the mark of a blob whose CRC is 0 from a missing mark
LEFTOVER_SECONDS = 3600.0  # an older hidden folder was left by a crashed run


class RowCache:
    """Blobs by row index; blob i has sizes[i] bytes.

    The folder is locked against eviction until `close`.
    """

    def __init__(self, folder: Path, lock: int, sizes: Sequence[int]) -> None:
        self._lock = lock
        self._offsets = [0, *accumulate(sizes)]
        self._rows = os.open(folder / "rows.bin", os.O_RDWR)
        self._marks = os.open(folder / "marks.bin", os.O_RDWR)
        os.utime(folder)  # time of last use, for `enforce_budget`
        self._missing: set[int] = set()
        self.refresh()

    def refresh(self) -> list[int]:
        """Reads again which rows are missing, and returns their indices.

        Other runs may have stored some.
        """
        num_rows = len(self._offsets) - 1
        marks = os.pread(self._marks, MARK_BYTES * num_rows, 0)
        self._missing = {
            i for i in range(num_rows) if not any(marks[MARK_BYTES * i : MARK_BYTES * (i + 1)])
        }
        return sorted(self._missing)

    @property
    def num_missing(self) -> int:
        """Rows that were missing at the last `refresh` and that this run has not stored since."""
        return len(self._missing)

    def get(self, index: int) -> Tensor | None:
        """Returns the bytes of a row, or None if they are missing or damaged."""
        start, stop = self._offsets[index : index + 2]
        blob = torch.empty(stop - start, dtype=torch.uint8)
        data = blob.numpy().data
        mark = os.pread(self._marks, MARK_BYTES, MARK_BYTES * index)
        if len(mark) == MARK_BYTES and _read(self._rows, data, start) and mark == _mark(data):
            self._missing.discard(index)
            return blob
        self._missing.add(index)
        return None

    def put(self, index: int, blob: Tensor) -> None:
        """Stores the bytes of a row."""
        start, stop = self._offsets[index : index + 2]
        assert len(blob) == stop - start
        data = blob.numpy().data
        _write(self._rows, data, start)
        _write(self._marks, memoryview(_mark(data)), MARK_BYTES * index)
        self._missing.discard(index)

    def close(self) -> None:
        """Closes the files and unlocks the cache, so that it can be evicted."""
        for descriptor in (self._rows, self._marks, self._lock):
            os.close(descriptor)

    def __enter__(self) -> "RowCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def cache_bytes(sizes: Sequence[int]) -> int:
    """Returns the disk space that a cache of these blobs takes."""
    return sum(sizes) + (MARK_BYTES + RECORD.size) * len(sizes) + MARK_BYTES


def open_cache(
    folder: Path, family: str, names: Sequence[bytes], sizes: Sequence[int], *, budget_bytes: int
) -> RowCache | None:
    """Opens the cache of these rows under `folder`, and creates it if needed.

    Returns None if the disk has no room for it. Two rows of a family with the same name have the
    same blob. To keep the total below the budget, other caches are evicted, the least recently used
    first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{family}-{hashlib.sha256(b''.join(names)).hexdigest()[:32]}"
    while True:
        lock = lock_path(path, fcntl.LOCK_SH)
        if lock is not None:
            return RowCache(path, lock, sizes)
        if path.exists():  # another run is evicting it
            time.sleep(0.01)
            continue
        enforce_budget(folder, budget_bytes - cache_bytes(sizes))
        try:
            _create(path, names, sizes)
        except OSError as error:
            if is_disk_full(error):
                return None
            raise


def enforce_budget(folder: Path, budget_bytes: int) -> None:
    """Deletes caches, the least recently used first, until the rest fits the budget.

    Caches that are in use stay. Also deletes what crashed runs have left behind.
    """
    caches = []
    for path in folder.iterdir():
        try:
            used_at, num_bytes = (
                path.stat().st_mtime,
                sum(file.stat().st_size for file in path.iterdir()),
            )
        except (FileNotFoundError, NotADirectoryError):
            continue  # another run has just evicted it, or it is no cache
        if not path.name.startswith("."):
            caches.append((used_at, num_bytes, path))
        elif time.time() - used_at > LEFTOVER_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    total_bytes = sum(num_bytes for _, num_bytes, _ in caches)
    for _, num_bytes, path in sorted(caches):
        if total_bytes <= budget_bytes:
            return
        lock = lock_path(path, fcntl.LOCK_EX)
        if lock is not None:
            doomed = path.with_name(f".{path.name}.{os.getpid()}.evicted")
            path.rename(doomed)  # other runs no longer find it while it is deleted
            shutil.rmtree(doomed, ignore_errors=True)
            os.close(lock)
            total_bytes -= num_bytes


def _create(path: Path, names: Sequence[bytes], sizes: Sequence[int]) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        for name, num_bytes in (("rows.bin", sum(sizes)), ("marks.bin", MARK_BYTES * len(sizes))):
            descriptor = os.open(fresh / name, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, max(1, num_bytes))
            finally:
                os.close(descriptor)
        index = b"".join(RECORD.pack(name, size) for name, size in zip(names, sizes, strict=True))
        (fresh / "index.bin").write_bytes(_mark(index) + index)
        with RowCache(fresh, os.open(fresh, os.O_RDONLY | os.O_DIRECTORY), sizes) as cache:
            _copy_family(path, cache, {name: number for number, name in enumerate(names)}, sizes)
        fresh.rename(path)
    except OSError as error:
        # another run was faster: use its cache
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _copy_family(
    path: Path, cache: RowCache, numbers: dict[bytes, int], sizes: Sequence[int]
) -> None:
    """Copies the rows with these names from the other caches of the family of `path`."""
    for sibling in sorted(path.parent.glob(f"{path.name.partition('-')[0]}-*")):
        lock = lock_path(sibling, fcntl.LOCK_SH)
        if lock is None:
            continue
        index = (sibling / "index.bin").read_bytes()
        mark, index = index[:MARK_BYTES], index[MARK_BYTES:]
        records = list(RECORD.iter_unpack(index)) if mark == _mark(index) else []
        with RowCache(sibling, lock, [size for _, size in records]) as other:
            for place, (name, size) in enumerate(records):
                number = numbers.get(name)
                if number is None or size != sizes[number]:
                    continue
                blob = other.get(place)
                if blob is not None:
                    cache.put(number, blob)
                    del numbers[name]


def _mark(data: memoryview | bytes) -> bytes:
    return struct.pack("<Q", MARK_FLAG | zlib.crc32(data))


def _read(descriptor: int, data: memoryview, offset: int) -> bool:
    while data:
        num_read = os.preadv(descriptor, [data], offset)
        if num_read == 0:
            return False  # the file is truncated
        data, offset = data[num_read:], offset + num_read
    return True


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        num_written = os.pwrite(descriptor, data, offset)
        data, offset = data[num_written:], offset + num_written
