"""File operations that are durable when they return: the data has been synced to disk."""

import hashlib
import os
from pathlib import Path


def hash_file(path: Path) -> tuple[str, int]:
    """Returns the SHA-256 (in hex) and the size in bytes of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def write_synced(path: Path, content: bytes) -> None:
    """Writes a new file and syncs it. Raises FileExistsError if the path exists."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def publish(source: Path, target: Path) -> None:
    """Renames a file or folder to its final path atomically, and syncs the target's folder.

    The content of `source` must have been synced before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Syncs the entries of a folder to disk, so that renames in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
