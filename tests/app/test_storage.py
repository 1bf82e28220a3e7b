import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from app.contracts.messages import ArtifactRef
from app.storage import MANIFEST, AlreadyStored, CorruptArtifact, StorageError, Store


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A folder, and an fsspec file system that is not local."""
    if request.param == "local":
        yield Store(str(tmp_path / "store"))
        return
    yield Store("memory://store")
    fsspec.filesystem("memory").rm("/store", recursive=True) if fsspec.filesystem("memory").exists(
        "/store"
    ) else None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made" / "model").mkdir(parents=True)
    (tmp_path / "made" / "model" / "config.json").write_text("{}")
    (tmp_path / "made" / "model" / "model.safetensors").write_bytes(os.urandom(10_000))
    (tmp_path / "made" / "manifest.json").write_text("the folder's own manifest")
    return tmp_path / "made"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def test_a_written_file_can_be_read(store: Store) -> None:
    with store.writer("files/file-1") as file:
        file.write(b"one ")
        file.write(b"two")
    with store.open("files/file-1") as file:
        assert file.read() == b"one two"
    assert store.children("files") == ["file-1"]
    assert store.age_seconds("files/file-1") < 60


def test_a_file_whose_writing_fails_never_appears(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), store.writer("files/file-1") as file:
        print(file.write(b"half") // 0)
    assert not store.exists("files/file-1")
    with pytest.raises(FileNotFoundError):
        store.open("files/file-1")
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_file_is_invisible_while_it_is_written(store: Store) -> None:
    with store.writer("files/file-1") as file:
        file.write(b"x" * 100_000)
        assert not store.exists("files/file-1")
    assert store.exists("files/file-1")


def test_a_folder_comes_back_as_it_was_put(store: Store, folder: Path, tmp_path: Path) -> None:
    ref = store.put_folder(folder, "checkpoints/job/7/step-10")
    assert ref.bytes == sum(len(content) for content in contents(folder).values())
    fetched = store.fetch_folder(ref, tmp_path / "cache")
    assert contents(fetched) == contents(folder)
    assert store.verify_folder(ref.key, ref.sha256)


def test_a_folder_inside_a_stored_folder_can_be_fetched(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    ref = store.put_folder(folder, "checkpoints/job/7/step-10")
    inside = ArtifactRef(key=f"{ref.key}/model", bytes=0)
    assert contents(store.fetch_folder(inside, tmp_path / "cache")) == contents(folder / "model")
    with pytest.raises(FileNotFoundError):
        store.fetch_folder(ArtifactRef(key=f"{ref.key}/missing", bytes=0), tmp_path / "cache")


def test_the_files_of_a_folder_are_listed_with_size_and_hash(store: Store, folder: Path) -> None:
    ref = store.put_folder(folder, "models/job/7")
    assert store.list_folder(ref) == [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents(folder).items())
    ]
    with pytest.raises(FileNotFoundError):
        store.list_folder(ArtifactRef(key="models/job/8", bytes=0, sha256=ref.sha256))


def test_putting_the_same_folder_again_changes_nothing(store: Store, folder: Path) -> None:
    first = store.put_folder(folder, "models/job/7")
    assert store.put_folder(folder, "models/job/7") == first
    assert store.verify_folder(first.key, first.sha256)


def test_another_folder_under_the_same_key_is_refused(store: Store, folder: Path) -> None:
    first = store.put_folder(folder, "models/job/7")
    (folder / "model" / "config.json").write_text('{"other": 1}')
    with pytest.raises(AlreadyStored):
        store.put_folder(folder, "models/job/7")
    assert store.verify_folder(first.key, first.sha256)


def test_a_flipped_bit_is_found(store: Store, folder: Path, tmp_path: Path) -> None:
    ref = store.put_folder(folder, "models/job/7")
    damage(
        store,
        tmp_path,
        f"{ref.key}/model/model.safetensors",
        lambda old: old[:-1] + bytes([old[-1] ^ 1]),
    )
    assert not store.verify_folder(ref.key, ref.sha256)
    if not store.is_local:
        with pytest.raises(CorruptArtifact):
            store.fetch_folder(ref, tmp_path / "cache")
        assert not list((tmp_path / "cache").glob("*"))


def test_a_missing_file_is_found(store: Store, folder: Path) -> None:
    ref = store.put_folder(folder, "models/job/7")
    store.delete(f"{ref.key}/model/config.json")
    assert not store.verify_folder(ref.key, ref.sha256)


def test_a_changed_manifest_is_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    ref = store.put_folder(folder, "models/job/7")
    damage(store, tmp_path, f"{ref.key}/{MANIFEST}", lambda old: old.replace(b"config", b"konfig"))
    with pytest.raises(CorruptArtifact):
        store.fetch_folder(ref, tmp_path / "cache")
    assert not store.verify_folder(ref.key, ref.sha256)


def test_a_manifest_cannot_lead_out_of_the_folder(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    ref = store.put_folder(folder, "models/job/7")
    evil = json.dumps({"files": [{"path": "../../evil", "bytes": 1, "sha256": "0"}]}).encode()
    damage(store, tmp_path, f"{ref.key}/{MANIFEST}", lambda old: evil)
    assert not store.verify_folder(ref.key)
    if not store.is_local:
        with pytest.raises(CorruptArtifact):
            store.fetch_folder(ArtifactRef(key=ref.key, bytes=0), tmp_path / "cache")


def test_a_link_in_a_folder_is_refused(store: Store, folder: Path) -> None:
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(StorageError, match="passwd is not a regular file"):
        store.put_folder(folder, "models/job/7")
    assert not store.exists("models/job/7")


def test_a_file_is_fetched_and_checked(store: Store, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"rows")
    ref = store.put_file(tmp_path / "rows.jsonl", "files/file-1")
    assert store.fetch_file(ref, tmp_path / "cache").read_bytes() == b"rows"
    assert store.fetch_file(ref, tmp_path / "cache").read_bytes() == b"rows"
    with pytest.raises(FileNotFoundError):
        store.fetch_file(ArtifactRef(key="files/other", bytes=1), tmp_path / "cache")


def test_deleting_removes_files_and_folders_and_may_be_repeated(store: Store, folder: Path) -> None:
    store.put_folder(folder, "models/job/7")
    store.put_file(folder / "manifest.json", "files/file-1")
    for key in ("models/job", "files/file-1"):
        store.delete(key)
        store.delete(key)
        assert not store.exists(key)


@pytest.mark.parametrize(
    "key",
    [
        "../x",
        "a/../b",
        "/etc/passwd",
        "a//b",
        "",
        ".incoming/x",
        "a/.b",
        "a\\b",
        "a/",
        "a\n",
        "x" * 256,
        "a\0",
    ],
)
def test_a_key_that_could_leave_the_store_is_refused(store: Store, key: str) -> None:
    with pytest.raises(StorageError):
        store.exists(key)
    with pytest.raises(StorageError), store.writer(key):
        pass


def test_linked_files_are_shared_and_copied_files_are_not(tmp_path: Path, folder: Path) -> None:
    store = Store(str(tmp_path / "store"))
    weights = folder / "model" / "model.safetensors"
    store.put_folder(folder, "linked", link=True)
    store.put_folder(folder, "copied")
    assert (tmp_path / "store" / "linked" / "model" / "model.safetensors").samefile(weights)
    assert not (tmp_path / "store" / "copied" / "model" / "model.safetensors").samefile(weights)


def test_what_a_killed_writer_left_is_swept_after_a_while(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    leftover = tmp_path / "store" / ".incoming" / "half"
    leftover.mkdir()
    assert store.sweep_incoming(3600) == 0
    os.utime(leftover, (0, 0))
    assert store.sweep_incoming(3600) == 1
    assert not leftover.exists()


def test_sweeping_goes_on_when_a_file_is_published_meanwhile(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))

    def write_files() -> None:
        for number in range(1000):
            with store.writer(f"files/file-{number}") as file:
                file.write(b"x")

    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write_files)
        while not writing.done():
            store.sweep_incoming(3600)
    writing.result()
    assert len(store.children("files")) == 1000


def test_names_that_are_no_keys_are_not_listed(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    folder = tmp_path / "store" / "files"
    folder.mkdir()
    for name in (".DS_Store", ".nfs0000000000000012", "a name", "file-1"):
        (folder / name).write_bytes(b"x")
    assert store.children("files") == ["file-1"]


def test_what_another_process_put_is_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system = fsspec.get_filesystem_class("memory")
    look = system.ls

    def ls(self: Any, path: str, **options: Any) -> Any:  # Any: fsspec is untyped
        """Remembers listings, as the file system of an object store does."""
        found = self.dircache.get(path) or look(self, path, **options)
        self.dircache[path] = found
        return found

    monkeypatch.setattr(system, "ls", ls)
    store, other = Store("memory://store"), fsspec.filesystem("memory")
    for names in (["a"], ["a", "b"]):
        other.pipe_file(f"/store/listed/{names[-1]}", b"x")
        assert store.children("listed") == names
    store.delete("listed")


def test_free_space_is_known_of_a_folder_only(tmp_path: Path) -> None:
    assert (Store(str(tmp_path)).free_bytes() or 0) > 0
    assert Store("memory://store").free_bytes() is None


def damage(store: Store, tmp_path: Path, key: str, change: Callable[[bytes], bytes]) -> None:
    path = f"{tmp_path}/store/{key}" if store.is_local else f"memory://store/{key}"
    with fsspec.open(path, "rb") as file:
        old = file.read()
    with fsspec.open(path, "wb") as file:
        file.write(change(old))
