"""Artifact store for uploads, checkpoints and models: a folder, or an fsspec URL such as s3://x/y.

Writes are atomic: a file or folder becomes visible when it is complete, or not at all. A stored
folder contains `_manifest.json` with the size and SHA-256 of each file. Database rows and messages
keep the SHA-256 of the manifest itself, so that every change is detected.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final, TypedDict

import fsspec

from app.contracts.messages import ArtifactRef
from app.fsync import hash_file, publish, sync_folder, write_synced
from app.local_copies import partial_copy
from app.settings import get_settings

MANIFEST: Final = "_manifest.json"
INCOMING: Final = ".incoming"  # incomplete writes of a local store; not a valid key
CHUNK_BYTES: Final = 4 * 2**20
KEY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@:+=-]*(/[A-Za-z0-9_][A-Za-z0-9._@:+=-]*)*")
MAX_KEY_LENGTH: Final = 255

MakeRoom = Callable[[int], None]  # called with the number of bytes before they are written


class StorageError(Exception):
    """The store cannot perform an operation; the message gives the reason and the path."""


class CorruptArtifact(StorageError):
    """The stored bytes differ from those that were written."""


class AlreadyStored(StorageError):
    """The key already holds other content, which a folder never overwrites."""


class Entry(TypedDict):
    """Manifest entry of one file; `path` is relative to the stored folder."""

    path: str
    bytes: int
    sha256: str


class Store:
    """Files and folders under keys such as `files/file-abc` and `checkpoints/job/7/step-100`."""

    def __init__(self, root: str) -> None:
        # Any: fsspec is untyped
        self._fs: Any
        # A cached listing would miss what other processes have stored.
        self._fs, self._root = fsspec.core.url_to_fs(root, use_listings_cache=False)
        self.is_local = isinstance(self._fs, fsspec.get_filesystem_class("file"))
        if self.is_local:
            (Path(self._root) / INCOMING).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def writer(self, key: str) -> Iterator[IO[bytes]]:
        """Yields a binary file. It is stored under the key if the block ends without an error."""
        path = self._path(key)
        if not self.is_local:
            # An object store makes an object visible only when its upload is complete.
            with tempfile.NamedTemporaryFile() as spool:
                yield spool
                spool.flush()
                self._fs.put_file(spool.name, path)
            return
        incoming = self._incoming()
        try:
            with incoming.open("xb") as local:
                yield local
                local.flush()
                os.fsync(local.fileno())
            publish(incoming, Path(path))
        except BaseException:
            incoming.unlink(missing_ok=True)
            raise

    @contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """Yields a temporary folder. `put_folder` can link its files into a local store."""
        parent = Path(self._root) / INCOMING if self.is_local else None
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)

    def open(self, key: str) -> IO[bytes]:
        """Opens a file for reading. Raises FileNotFoundError if the key does not exist."""
        file: IO[bytes] = self._fs.open(self._path(key), "rb")
        return file

    def put_file(self, local: Path, key: str) -> ArtifactRef:
        """Stores a local file and returns its reference. Replaces an existing file."""
        digest, size = hashlib.sha256(), 0
        with local.open("rb") as source, self.writer(key) as target:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                size += target.write(chunk)
        return ArtifactRef(key=key, bytes=size, sha256=digest.hexdigest())

    def put_folder(self, local: Path, key: str, *, link: bool = False) -> ArtifactRef:
        """Stores all files below `local` and returns the reference of the folder.

        Storing the same content again succeeds. With `link`, a local store may use hard links, so
        the caller must never change the files in place.

        Raises:
            AlreadyStored: The key holds other content.
            StorageError: `local` has no files, or contains links or special files.
        """
        target = self._path(key)
        if not self.is_local:
            return self._upload_folder(local, key)
        incoming = self._incoming()
        try:
            incoming.mkdir()
            entries = [_take_in(local, path, incoming, link=link) for path in _plain_files(local)]
            manifest = _manifest_bytes(entries)
            write_synced(incoming / MANIFEST, manifest)
            for folder, _, _ in os.walk(incoming):
                sync_folder(Path(folder))
            ref = _folder_ref(key, entries, manifest)
            if not Path(target).exists():
                publish(incoming, Path(target))
            elif self._manifest(key) != manifest:
                raise AlreadyStored(f"the store already has a different {key}; use a new key")
            return ref
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def fetch_folder(
        self, ref: ArtifactRef, cache_dir: Path, make_room: MakeRoom | None = None
    ) -> Path:
        """Returns a local folder with the artifact, which the caller must not change.

        For a local store this is the stored folder itself, else a verified copy in `cache_dir`.
        Without a SHA-256, `ref` may also name a folder inside a stored folder. `make_room` is
        called with the size of a copy before it is downloaded.

        Raises:
            FileNotFoundError: The store has no such folder.
            CorruptArtifact: The manifest or a downloaded file has changed.
        """
        manifest, inside = self._checked_manifest(ref)
        if self.is_local:
            return Path(self._path(ref.key))
        target = cache_dir / hashlib.sha256(f"{inside}\n".encode() + manifest).hexdigest()
        if target.exists():
            return target
        entries = _entries(manifest, inside)
        if make_room is not None:
            make_room(sum(entry["bytes"] for entry in entries))
        with partial_copy(cache_dir) as partial:
            for entry in entries:
                self._download(
                    f"{ref.key}/{entry['path']}", partial / "copy" / entry["path"], entry["sha256"]
                )
            try:
                (partial / "copy").rename(target)
            except OSError:  # another process has made the same copy
                if not target.exists():
                    raise
        return target

    def fetch_file(
        self, ref: ArtifactRef, cache_dir: Path, make_room: MakeRoom | None = None
    ) -> Path:
        """Returns a local file with the artifact: the stored file, or a copy in `cache_dir`.

        A copy is verified if `ref` has a SHA-256. Raises as `fetch_folder` does.
        """
        path = self._path(ref.key)
        if self.is_local:
            if not Path(path).is_file():
                raise FileNotFoundError(ref.key)
            return Path(path)
        target = cache_dir / (ref.sha256 or hashlib.sha256(ref.key.encode()).hexdigest())
        if not (target.exists() and ref.sha256):
            if make_room is not None:
                make_room(ref.bytes)
            with partial_copy(cache_dir) as partial:
                self._download(ref.key, partial / "copy", ref.sha256)
                (partial / "copy").rename(target)
        return target

    def list_folder(self, ref: ArtifactRef) -> list[Entry]:
        """Returns the files of a folder, as its manifest lists them. Raises as `fetch_folder` does."""
        return _entries(*self._checked_manifest(ref))

    def verify_folder(self, key: str, sha256: str | None = None) -> bool:
        """Reads all files and returns whether the folder is complete and unchanged.

        `sha256` is the expected SHA-256 of the manifest.
        """
        try:
            entries = _entries(
                *self._checked_manifest(ArtifactRef(key=key, bytes=0, sha256=sha256))
            )
            return all(
                self._sha256(f"{self._path(key)}/{e['path']}") == (e["sha256"], e["bytes"])
                for e in entries
            )
        except (FileNotFoundError, CorruptArtifact):
            return False

    def delete(self, key: str) -> None:
        """Deletes a file or a folder. Does nothing if the key does not exist."""
        path = self._path(key)
        if self.is_local:
            doomed = self._incoming()
            try:
                os.rename(path, doomed)  # takes effect even if the deletion is interrupted
            except FileNotFoundError:
                return
            shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
        elif self._fs.exists(path):
            self._fs.rm(path, recursive=True)

    def exists(self, key: str) -> bool:
        return bool(self._fs.exists(self._path(key)))

    def children(self, key: str) -> list[str]:
        """Returns the sorted names directly below a key, or an empty list if there are none.

        Names that are not valid in a key, such as `.DS_Store`, are left out.
        """
        try:
            paths: list[str] = self._fs.ls(self._path(key), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
        return sorted(name for name in names if _is_key(f"{key}/{name}"))

    def age_seconds(self, key: str) -> float:
        """Returns the seconds since the file was last written. Raises FileNotFoundError."""
        return time.time() - float(self._fs.modified(self._path(key)).timestamp())

    def sweep_incoming(self, older_than_seconds: float) -> int:
        """Deletes old incomplete writes of killed processes from a local store.

        Returns the number of deleted files and folders.
        """
        num_removed = 0
        folder = Path(self._root) / INCOMING
        for path in folder.iterdir() if self.is_local else ():
            with suppress(OSError):  # published or deleted after it was listed
                if time.time() - path.lstat().st_mtime > older_than_seconds:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
                    num_removed += 1
        return num_removed

    def free_bytes(self) -> int | None:
        """Returns the free disk space of a local store, or None for a remote one."""
        return shutil.disk_usage(self._root).free if self.is_local else None

    def _path(self, key: str) -> str:
        if not _is_key(key):
            raise StorageError(f"{key!r} is not a store key")
        return f"{self._root}/{key}"

    def _incoming(self) -> Path:
        return Path(self._root) / INCOMING / uuid.uuid4().hex

    def _manifest(self, key: str) -> bytes:
        with self._fs.open(f"{self._path(key)}/{MANIFEST}", "rb") as file:
            content: bytes = file.read()
            return content

    def _checked_manifest(self, ref: ArtifactRef) -> tuple[bytes, str]:
        """Returns the manifest of the folder that contains the key, and the key's path inside it.

        Parent folders are searched only if `ref` has no SHA-256.
        """
        key = ref.key
        while (
            not self._fs.exists(f"{self._path(key)}/{MANIFEST}")
            and "/" in key
            and ref.sha256 is None
        ):
            key = key.rpartition("/")[0]
        inside = ref.key[len(key) + 1 :]
        manifest = self._manifest(key)
        if ref.sha256 is not None and hashlib.sha256(manifest).hexdigest() != ref.sha256:
            raise CorruptArtifact(f"the manifest of {ref.key} has changed since it was stored")
        if inside and not _entries(manifest, inside):
            raise FileNotFoundError(ref.key)
        return manifest, inside

    def _sha256(self, path: str) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        with self._fs.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return digest.hexdigest(), size

    def _upload_folder(self, local: Path, key: str) -> ArtifactRef:
        entries: list[Entry] = []
        for path in _plain_files(local):
            name = path.relative_to(local).as_posix()
            digest, size = hash_file(path)
            entries.append({"path": name, "bytes": size, "sha256": digest})
        manifest = _manifest_bytes(entries)
        if self._fs.exists(f"{self._path(key)}/{MANIFEST}"):
            if self._manifest(key) != manifest:
                raise AlreadyStored(f"the store already has a different {key}; use a new key")
            return _folder_ref(key, entries, manifest)
        for entry in entries:
            self._fs.put_file(str(local / entry["path"]), f"{self._path(key)}/{entry['path']}")
        self._fs.pipe_file(f"{self._path(key)}/{MANIFEST}", manifest)
        return _folder_ref(key, entries, manifest)

    def _download(self, key: str, target: Path, sha256: str | None) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(f"{self._root}/{key}", str(target))
        if sha256 is not None and hash_file(target)[0] != sha256:
            raise CorruptArtifact(f"the content of {key} has changed since it was stored")


@lru_cache
def store() -> Store:
    """Returns the store that the settings name; the same object at each call."""
    return Store(get_settings().store_root())


def _is_key(key: str) -> bool:
    return KEY.fullmatch(key) is not None and len(key) <= MAX_KEY_LENGTH


def _plain_files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StorageError(f"{path.relative_to(folder)} is not a regular file")
        if path.is_file() and path != folder / MANIFEST:
            found.append(path)
    if not found:
        raise StorageError(f"{folder} contains no files")
    return found


def _take_in(source: Path, path: Path, incoming: Path, *, link: bool) -> Entry:
    """Copies or hard-links one file into the incoming folder, and syncs it to disk."""
    name = path.relative_to(source)
    target = incoming / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not link:
            raise OSError
        os.link(path, target)
    except OSError:  # no link wanted, or the filesystem does not allow one
        shutil.copyfile(path, target)
    digest, size = hash_file(target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return {"path": name.as_posix(), "bytes": size, "sha256": digest}


def _manifest_bytes(entries: list[Entry]) -> bytes:
    return json.dumps(
        {"files": sorted(entries, key=lambda entry: entry["path"])}, indent=1
    ).encode()


def _entries(manifest: bytes, inside: str = "") -> list[Entry]:
    """Returns the entries below the folder `inside`, with paths relative to it."""
    try:
        entries: list[Entry] = json.loads(manifest)["files"]
        if any(
            ".." in Path(entry["path"]).parts or entry["path"].startswith("/") for entry in entries
        ):
            raise ValueError("a path points outside the folder")
        prefix = f"{inside}/" if inside else ""
        return [
            {**entry, "path": entry["path"].removeprefix(prefix)}
            for entry in entries
            if entry["path"].startswith(prefix)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact("a manifest in the store cannot be read") from error


def _folder_ref(key: str, entries: list[Entry], manifest: bytes) -> ArtifactRef:
    total = sum(entry["bytes"] for entry in entries)
    return ArtifactRef(key=key, bytes=total, sha256=hashlib.sha256(manifest).hexdigest())
