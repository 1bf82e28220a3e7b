"""Local folders of the plain models that a serve worker loads."""

import hashlib
import os
from pathlib import Path
from typing import Protocol

from app.contracts.messages import ArtifactRef, read_adapter_base
from app.local_copies import partial_copy, use_copy


class Copies(Protocol):
    """The methods of app.artifact_cache.ArtifactCache that `plain_folder` needs."""

    folder: Path

    def fetch_folder(self, ref: ArtifactRef) -> Path: ...
    def hold(self, ref: ArtifactRef, lock: int) -> None: ...
    def make_room(self, num_bytes: int) -> None: ...


def plain_folder(copies: Copies, ref: ArtifactRef) -> Path:
    """Returns a local folder with a model. The caller must not change its content.

    The adapters of a checkpoint are merged into the weights of their start model. The merged model
    counts as a copy of `ref`: it is reused, locked, and evicted like those of a remote store.

    Raises:
        FileNotFoundError: The store has no such folder, or not the start model of its adapters.
        CorruptArtifact: The stored bytes differ from those of the artifact.
        CorruptCheckpoint: The adapters do not match their start model.
    """
    adapters_dir = copies.fetch_folder(ref)
    base = read_adapter_base(adapters_dir)
    if base is None:
        return adapters_dir
    if base.start is None:
        raise FileNotFoundError(f"{ref.key} does not name the start model of its adapters")
    target = copies.folder / f"merged-{hashlib.sha256(ref.key.encode()).hexdigest()}"
    while (lock := use_copy(target)) is None:
        _merge(copies, base.start, adapters_dir, target)
    copies.hold(ref, lock)
    return target


def _merge(copies: Copies, start: ArtifactRef, adapters_dir: Path, target: Path) -> None:
    from worker.models.adapters import merge_adapters  # slow to import, and rarely needed

    start_dir = plain_folder(copies, start)
    # other processes evict copies that are not locked, and this process may release `start`
    lock = use_copy(start_dir) if copies.folder in start_dir.parents else None
    try:
        copies.make_room(sum(path.stat().st_size for path in start_dir.iterdir()))
        with partial_copy(copies.folder) as partial:
            merge_adapters(start_dir, adapters_dir, partial / "copy").rename(target)
    except OSError:
        if not target.exists():  # else another process has merged them
            raise
    finally:
        if lock is not None:
            os.close(lock)
