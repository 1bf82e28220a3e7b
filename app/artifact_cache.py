"""Local cache of artifacts of a remote store, with a byte budget and locks on copies in use."""

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
    """Fetches artifacts into a folder that several processes may share, and locks those in use.

    A returned path stays valid until `retain` or `close` releases it, or until this process ends.
    Only copies in use can exceed the budget. A local store needs no copies, so the methods return
    the store's own paths.
    """

    def __init__(self, store: Store, folder: Path, budget_bytes: int) -> None:
        self._store, self.folder, self._budget_bytes = store, folder, budget_bytes
        self._guard = threading.Lock()
        self._locks: dict[ArtifactRef, int] = {}

    def fetch_folder(self, ref: ArtifactRef) -> Path:
        """Returns a local folder with the artifact. The caller must not change its content.

        Raises:
            FileNotFoundError: The store has no such folder.
            CorruptArtifact: The stored bytes differ from those of the artifact.
        """
        return self._fetch(ref, self._store.fetch_folder)

    def fetch_file(self, ref: ArtifactRef) -> Path:
        """Returns a local file with the artifact. Raises the same errors as `fetch_folder`."""
        return self._fetch(ref, self._store.fetch_file)

    def retain(self, refs: Collection[ArtifactRef]) -> None:
        """Releases all artifacts except `refs`. Thread-safe."""
        with self._guard:
            for ref in self._locks.keys() - set(refs):
                os.close(self._locks.pop(ref))

    def close(self) -> None:
        """Releases all artifacts. Their copies stay on disk until the space is needed."""
        self.retain(())

    def _fetch(self, ref: ArtifactRef, fetch: Fetch) -> Path:
        while True:
            path = fetch(ref, self.folder, self.make_room)
            if self._store.is_local:
                return path
            lock = use_copy(path)
            if lock is not None:
                break
            time.sleep(RETRY_SECONDS)  # another process evicted the copy before it was locked
        self.hold(ref, lock)
        return path

    def hold(self, ref: ArtifactRef, lock: int) -> None:
        """Keeps the lock on the copy of an artifact until the artifact is released."""
        with self._guard:
            if ref in self._locks:
                os.close(self._locks[ref])
            self._locks[ref] = lock

    def make_room(self, num_bytes: int) -> None:
        """Evicts copies that are not in use, so that `num_bytes` more fit into the budget."""
        make_room(self.folder, self._budget_bytes - num_bytes)
