"""The cache's promise: a blob is what was put, or it is missing."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from worker.distill.teachers.row_cache import RowCache, cache_bytes, enforce_budget, open_cache

SIZES = [5, 0, 12, 7]
NAMES = [bytes([number]) * 16 for number in range(4)]


def blob(index: int) -> Tensor:
    return torch.arange(SIZES[index], dtype=torch.uint8) + index


def opened(folder: Path, family: str = "a", budget_bytes: int = 2**20) -> RowCache:
    cache = open_cache(folder, family, NAMES, SIZES, budget_bytes=budget_bytes)
    assert cache is not None
    return cache


def folder_of(folder: Path, family: str = "a") -> Path:
    (found,) = folder.glob(f"{family}-*")
    return found


def families(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def is_stored(cache: RowCache, index: int) -> bool:
    found = cache.get(index)
    return found is not None and torch.equal(found, blob(index))


def test_blobs_outlive_the_run_that_put_them(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        assert cache.num_missing == 4
        for index in (0, 1, 3):
            cache.put(index, blob(index))
        assert cache.num_missing == 1
    with opened(tmp_path) as cache:
        assert cache.num_missing == 1
        assert [is_stored(cache, index) for index in range(4)] == [True, True, False, True]


def test_what_another_run_puts_is_found(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        other.put(2, blob(2))
        assert is_stored(one, 2)
        assert one.num_missing == 3


def test_a_run_killed_half_way_leaves_whole_blobs_or_none(tmp_path: Path) -> None:
    script = """
        import os, signal, sys, torch
        from pathlib import Path
        from worker.distill.teachers import row_cache as module
        names = [bytes([number]) * 16 for number in range(4)]
        cache = module.open_cache(Path(sys.argv[1]), "a", names, [5, 0, 12, 7], budget_bytes=2**20)
        cache.put(0, torch.arange(5, dtype=torch.uint8))
        write = os.pwrite
        def die_in_the_middle(descriptor, data, offset):
            write(descriptor, data[:6], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        os.pwrite = die_in_the_middle
        cache.put(2, torch.arange(12, dtype=torch.uint8) + 2)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path], check=False)
    assert run.returncode == -9
    with opened(tmp_path) as cache:
        assert is_stored(cache, 0)
        assert cache.get(2) is None
        cache.put(2, blob(2))
        assert is_stored(cache, 2)


@pytest.mark.parametrize("name", ["rows.bin", "marks.bin"])
def test_a_flipped_bit_makes_the_blob_missing(name: str, tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        for index in range(4):
            cache.put(index, blob(index))
    path = folder_of(tmp_path) / name
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 4
    path.write_bytes(damaged)
    with opened(tmp_path) as cache:
        assert cache.get(0) is None
        assert cache.num_missing == 1
        assert is_stored(cache, 2)


@pytest.mark.parametrize("name", ["rows.bin", "marks.bin"])
def test_a_file_cut_short_makes_the_blobs_behind_the_cut_missing(name: str, tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        for index in range(4):
            cache.put(index, blob(index))
    os.truncate(folder_of(tmp_path) / name, 20)
    with opened(tmp_path) as cache:
        assert is_stored(cache, 0)
        assert cache.get(3) is None
        cache.put(3, blob(3))
        assert is_stored(cache, 3)


def test_the_least_recently_used_cache_is_evicted_first(tmp_path: Path) -> None:
    for age, key in enumerate(("new", "middle", "old")):
        opened(tmp_path, key).close()
        os.utime(folder_of(tmp_path, key), (time.time() - 1000 * age,) * 2)
    opened(tmp_path, "old").close()  # now the newest
    enforce_budget(tmp_path, 2 * cache_bytes(SIZES))
    assert families(tmp_path) == ["new", "old"]


def test_a_file_beside_the_caches_does_not_keep_a_cache_from_being_made(tmp_path: Path) -> None:
    for name in (".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (0, 0))
    with opened(tmp_path, budget_bytes=1) as cache:
        cache.put(0, blob(0))
        assert is_stored(cache, 0)


def test_a_new_cache_makes_its_room(tmp_path: Path) -> None:
    opened(tmp_path, "a").close()
    opened(tmp_path, "b", budget_bytes=cache_bytes(SIZES) + 1).close()
    assert families(tmp_path) == ["b"]


def test_a_cache_in_use_is_not_evicted(tmp_path: Path) -> None:
    with opened(tmp_path):
        enforce_budget(tmp_path, 0)
        assert (folder_of(tmp_path) / "rows.bin").exists()
    enforce_budget(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_runs_are_removed_after_an_hour(tmp_path: Path) -> None:
    for name, age in ((".fresh.1", 60), (".stale.2", 4000)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    enforce_budget(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == [".fresh.1"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_gives_no_cache_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert open_cache(tmp_path, "a", NAMES, SIZES, budget_bytes=2**20) is None
    assert list(tmp_path.iterdir()) == []


def test_space_is_reserved_at_creation(tmp_path: Path) -> None:
    with open_cache(tmp_path, "a", NAMES[:1], [2**20], budget_bytes=2**30) or pytest.fail(
        "no cache"
    ):
        assert (folder_of(tmp_path) / "rows.bin").stat().st_blocks * 512 >= 2**20


def opened_again(folder: Path, order: list[int], family: str = "a") -> RowCache:
    """A cache of those rows, and of one that no other has."""
    names, sizes = [*(NAMES[i] for i in order), b"n" * 16], [*(SIZES[i] for i in order), 9]
    cache = open_cache(folder, family, names, sizes, budget_bytes=2**20)
    assert cache is not None
    return cache


def test_a_new_cache_begins_with_what_its_family_has(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        for index in (0, 2, 3):
            cache.put(index, blob(index))
    with opened_again(tmp_path, [3, 2, 1]) as cache:
        assert cache.refresh() == [2, 3]
        found = [cache.get(0), cache.get(1)]
        assert all(
            a is not None and torch.equal(a, b)
            for a, b in zip(found, (blob(3), blob(2)), strict=True)
        )
    with opened_again(tmp_path, [3, 2, 1], "b") as stranger:
        assert stranger.num_missing == 4


@pytest.mark.parametrize("name", ["rows.bin", "marks.bin", "index.bin"])
def test_what_is_damaged_in_the_family_is_not_copied(name: str, tmp_path: Path) -> None:
    with opened(tmp_path / "sound") as cache:
        for index in range(4):
            cache.put(index, blob(index))
    num_lost = 0
    for at in range((folder_of(tmp_path / "sound") / name).stat().st_size):
        shutil.copytree(tmp_path / "sound", tmp_path / str(at))
        path = folder_of(tmp_path / str(at)) / name
        damaged = bytearray(path.read_bytes())
        damaged[at] ^= 128
        path.write_bytes(damaged)
        with opened_again(tmp_path / str(at), [3, 2, 1, 0]) as cache:
            lost = cache.refresh()
            num_lost += len(lost) - 1
            for place in set(range(4)) - set(lost):
                found = cache.get(place)
                assert found is not None
                assert torch.equal(found, blob(3 - place))
    assert num_lost > 0


def test_a_family_that_is_being_evicted_is_passed_over(tmp_path: Path) -> None:
    opened(tmp_path).close()
    lock = os.open(folder_of(tmp_path), os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with opened_again(tmp_path, [0, 1]) as cache:
        assert cache.num_missing == 3
    os.close(lock)
