"""Local copies of what a remote artifact store holds: verified, within a byte budget, locked while in use."""

import os
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from app.contracts.messages import ArtifactRef
from app.local_copies import make_room, use_copy
from app.storage import MakeRoom, Store

RETRY_SECONDS = 0.01

Fetch = Callable[[ArtifactRef, Path, MakeRoom], Path]


class ArtifactCache:
    """Fetches artifacts into a folder that other processes may share, and keeps those in use.

    What a method returns stays until `retain` or `close` lets it go, or this process ends. The budget is
    exceeded only by copies in use. A store that is a folder needs no copies: its own paths are returned.
    """

    def __init__(self, store: Store, folder: Path, budget_bytes: int) -> None:
        self._store, self._folder, self._budget_bytes = store, folder, budget_bytes
        self._guard = threading.Lock()
        self._locks: dict[ArtifactRef, int] = {}

    def fetch_folder(self, ref: ArtifactRef) -> Path:
        """Returns a local folder with the artifact. Never change its content.

        Raises:
            FileNotFoundError: The store has no such folder.
            CorruptArtifact: The store's bytes are not those of the artifact.
        """
        return self._fetch(ref, self._store.fetch_folder)

    def fetch_file(self, ref: ArtifactRef) -> Path:
        """Returns a local file with the artifact; raises as `fetch_folder` does."""
        return self._fetch(ref, self._store.fetch_file)

    def retain(self, refs: Collection[ArtifactRef]) -> None:
        """Lets all artifacts go but these; callable from any thread."""
        with self._guard:
            for ref in self._locks.keys() - set(refs):
                os.close(self._locks.pop(ref))

    def close(self) -> None:
        """Lets all artifacts go; their copies stay on disk until room is needed."""
        self.retain(())

    def _fetch(self, ref: ArtifactRef, fetch: Fetch) -> Path:
        while True:
            path = fetch(ref, self._folder, self._make_room)
            if self._store.is_local:
                return path
            lock = use_copy(path)
            if lock is not None:
                break
            time.sleep(RETRY_SECONDS)  # another process has just evicted it
        with self._guard:
            if ref in self._locks:
                os.close(self._locks[ref])
            self._locks[ref] = lock
        return path

    def _make_room(self, num_bytes: int) -> None:
        make_room(self._folder, self._budget_bytes - num_bytes)
