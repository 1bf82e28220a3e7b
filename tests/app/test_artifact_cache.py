"""Copies of a remote store's artifacts: how many stay, which of them, and for how long."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from app.artifact_cache import ArtifactCache
from app.contracts.messages import ArtifactRef
from app.storage import CorruptArtifact, Store

SIZE = 1000
HOLD = """
import sys
from pathlib import Path
from app.artifact_cache import ArtifactCache
from app.storage import Store
store, folder = Store("memory://copies"), Path(sys.argv[1])
ref = store.put_folder(Path(sys.argv[2]), "models/held")
print(ArtifactCache(store, folder, 0).fetch_folder(ref), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store() -> Iterator[Store]:
    yield Store("memory://copies")
    fsspec.filesystem("memory").rm("/copies", recursive=True)


@pytest.fixture
def refs(store: Store, tmp_path: Path) -> list[ArtifactRef]:
    return [
        put_folder(store, tmp_path / f"made-{number}", f"models/{number}") for number in range(3)
    ]


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    return tmp_path / "copies"


def put_folder(store: Store, folder: Path, key: str) -> ArtifactRef:
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(SIZE))
    return store.put_folder(folder, key)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_least_recently_used_copy_goes_first(
    store: Store, refs: list[ArtifactRef], copies: Path
) -> None:
    cache = ArtifactCache(store, copies, 2 * SIZE)
    paths = []
    for age, ref in ((1, refs[0]), (2, refs[1])):
        paths.append(cache.fetch_folder(ref))
        os.utime(paths[-1], (age, age))
    cache.fetch_folder(refs[0])  # used again, so that the other one is older
    cache.close()
    third = cache.fetch_folder(refs[2])
    assert names(copies) == {paths[0].name, third.name}


def test_a_copy_in_use_stays_whatever_the_budget(
    store: Store, refs: list[ArtifactRef], copies: Path
) -> None:
    cache, other = (ArtifactCache(store, copies, SIZE) for _ in range(2))
    paths = [cache.fetch_folder(ref) for ref in refs[:2]]
    last = other.fetch_folder(refs[2])
    assert names(copies) == {path.name for path in [*paths, last]}
    cache.retain(refs[:1])
    other.close()
    (copies / last.name / "weights").unlink()
    (copies / last.name).rmdir()
    other.fetch_folder(refs[2])
    assert names(copies) == {paths[0].name, last.name}


def test_files_and_folders_share_the_budget(
    store: Store, refs: list[ArtifactRef], copies: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows").write_bytes(os.urandom(SIZE))
    rows = store.put_file(tmp_path / "rows", "files/rows")
    cache = ArtifactCache(store, copies, SIZE)
    assert cache.fetch_file(rows).read_bytes() == (tmp_path / "rows").read_bytes()
    cache.close()
    folder = cache.fetch_folder(refs[0])
    assert names(copies) == {folder.name}


def test_another_process_keeps_its_copy_until_it_is_killed(
    store: Store, refs: list[ArtifactRef], copies: Path, tmp_path: Path
) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "weights").write_bytes(b"held")
    command = [sys.executable, "-c", HOLD, str(copies), str(tmp_path / "held")]
    cache = ArtifactCache(store, copies, 0)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        cache.fetch_folder(refs[0])
        assert held.exists()
        holder.kill()
    cache.close()
    second = cache.fetch_folder(refs[1])
    assert names(copies) == {second.name}


def test_what_a_killed_download_left_is_deleted(
    store: Store, refs: list[ArtifactRef], copies: Path
) -> None:
    (copies / ".partial" / "copy").mkdir(parents=True)
    (copies / ".partial" / "copy" / "weights").write_bytes(b"half")
    path = ArtifactCache(store, copies, 10 * SIZE).fetch_folder(refs[0])
    assert names(copies) == {path.name}


def test_a_damaged_artifact_leaves_no_copy(
    store: Store, refs: list[ArtifactRef], copies: Path
) -> None:
    fsspec.filesystem("memory").pipe_file(f"/copies/{refs[0].key}/weights", b"other")
    with pytest.raises(CorruptArtifact):
        ArtifactCache(store, copies, 10 * SIZE).fetch_folder(refs[0])
    assert names(copies) == set()


def test_a_store_that_is_a_folder_is_read_in_place(tmp_path: Path, copies: Path) -> None:
    local = Store(str(tmp_path / "store"))
    ref = put_folder(local, tmp_path / "made", "models/0")
    cache = ArtifactCache(local, copies, 0)
    assert cache.fetch_folder(ref) == tmp_path / "store" / "models" / "0"
    assert not copies.exists()
