"""Progress of an upload, counted while the HTTP client reads the files."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

LINE_SECONDS: Final = 2.0


class UploadProgress:
    """Prints how much of the files has been sent, at most once every LINE_SECONDS."""

    def __init__(self, num_total: int, tell: Callable[[str], None]) -> None:
        self._num_total, self._tell = num_total, tell
        self.restart()

    def restart(self) -> None:
        """Counts from zero again, for another attempt."""
        self._num_sent, self._began = 0, time.monotonic()
        self._told_at = self._began

    def add(self, num_bytes: int) -> None:
        """Counts bytes that have been sent."""
        self._num_sent += num_bytes
        now = time.monotonic()
        if now - self._told_at >= LINE_SECONDS:
            self._told_at = now
            percent = 100 * self._num_sent / max(1, self._num_total)
            sent, total = self._num_sent / 1e6, self._num_total / 1e6
            rate = sent / (now - self._began)
            self._tell(f"sent {sent:,.1f} MB of {total:,.1f} MB ({percent:.0f}%), {rate:,.1f} MB/s")


class CountedFile(io.FileIO):
    """File that reports the bytes that are read from it."""

    def __init__(self, path: Path, progress: UploadProgress) -> None:
        super().__init__(path)
        self._progress = progress

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(-1 if size is None else size) or b""
        self._progress.add(len(piece))
        return piece
