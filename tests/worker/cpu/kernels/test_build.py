"""How the C kernels are built and kept, and what they do without memory or with a bad token."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from worker import build_kernels
from worker.cpu.kernels import build
from worker.cpu.kernels.bindings import kernels

NO_MEMORY = """
#include <stddef.h>
void *no_malloc(size_t size) { return NULL; }
void *no_calloc(size_t count, size_t size) { return NULL; }
void *no_aligned_alloc(size_t alignment, size_t size) { return NULL; }
"""
CALLS = """
import ctypes, sys, torch
from worker.cpu.kernels.bindings import Kernels

torch.set_num_threads(2)
does = Kernels(ctypes.CDLL(sys.argv[1]))
x = torch.zeros(1, 4, 2, 16)
calls = {
    "distil": lambda: does.distil(
        torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), beta=None, ce_weight=0.5, factor=1.0
    ),
    "attend_causally": lambda: does.attend_causally(x, x, x, 0.2),
    "attention_gradients": lambda: does.attention_gradients(x, (x, x, x), torch.zeros(1, 2, 4, 16), 0.2),
    "norm_gradients": lambda: does.norm_gradients(
        torch.zeros(3, 8), torch.zeros(3, 8), torch.ones(8), torch.ones(3), needs_weight=True
    ),
    "attend": lambda: does.attend(
        torch.zeros(6, 64), None, (torch.zeros(3, 1, 8, 16), torch.zeros(3, 1, 8, 16)),
        torch.zeros(3, dtype=torch.long), num_heads=2, column=2, scaling=0.2,
    ),
    "multiply_split": lambda: does.multiply_split(torch.zeros(3, 8), torch.zeros(5, 8)),
}
for name, call in calls.items():
    try:
        call()
    except MemoryError:
        print(name)
"""


@pytest.mark.skipif(kernels() is None, reason="no C compiler here")
def test_a_kernel_without_memory_raises_and_the_process_lives(tmp_path: Path) -> None:
    source, library = tmp_path / "no_memory.c", tmp_path / "kernels.so"
    source.write_text(NO_MEMORY)
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*"))
    renamed = [f"-D{name}=no_{name}" for name in ("malloc", "calloc", "aligned_alloc")]
    sources = [*map(str, build.SOURCES), str(source), str(openmp), "-lm"]
    compiler = shutil.which("gcc") or "cc"
    build._compile([compiler, *build.FLAGS, "-O0", *renamed, *sources], library)
    child = subprocess.run(
        [sys.executable, "-c", CALLS, library], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [
        "distil",
        "attend_causally",
        "attention_gradients",
        "norm_gradients",
        "attend",
        "multiply_split",
    ]


@pytest.mark.parametrize("target", [-100, -1, 5, 2**40])
def test_a_target_outside_the_vocabulary_is_refused_and_nothing_is_written(target: int) -> None:
    ops = kernels()
    if ops is None:
        pytest.skip("no C compiler here")
    student, targets = torch.randn(3, 5), torch.tensor([0, target, 4])
    before = student.clone()
    with pytest.raises(IndexError, match="outside the vocabulary"):
        ops.distil(student, torch.randn(3, 5), targets, beta=None, ce_weight=0.5, factor=1.0)
    assert torch.equal(student, before)


PLAIN = ["-O0", "-march=native", "-fopenmp", "-shared", "-fPIC"]  # compiles in a second


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders for the library, the first of which cannot be written even by root."""
    if kernels() is None:
        pytest.skip("no C compiler here")
    (tmp_path / "file").touch()
    folders = [tmp_path / "file" / "cache", tmp_path / "user"]
    monkeypatch.setattr(build, "cache_folders", lambda: folders)
    monkeypatch.setattr(build, "FLAGS", PLAIN)
    return folders


def test_the_library_is_built_once_and_kept_where_it_can_be_written(folders: list[Path]) -> None:
    assert build.find_library() is None
    path = build.build_library()
    assert path.parent == folders[1]
    built_at = path.stat().st_mtime_ns
    assert build.find_library() == build.build_library() == path
    assert path.stat().st_mtime_ns == built_at
    assert list(folders[1].iterdir()) == [path]  # nothing else is left


def test_without_a_folder_the_library_is_built_for_the_process(folders: list[Path]) -> None:
    del folders[1]
    with pytest.raises(build.NoCacheFolder, match="cannot be written"):
        build.build_library()
    library = build.load_library()
    assert library is not None
    assert library.has_tiles() in (0, 1)


def test_another_source_or_option_makes_another_library(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.library_name(build.compile_command())
    monkeypatch.setattr(build, "FLAGS", [*PLAIN, "-g"])
    assert build.library_name(build.compile_command()) != first


def test_a_new_library_removes_the_oldest_ones(folders: list[Path]) -> None:
    folders[1].mkdir()
    for number in range(build.MAX_KEPT):
        older = folders[1] / f"kernels-{number}.so"
        older.touch()
        os.utime(older, (number, number))
    path = build.build_library()
    kept = {f"kernels-{number}.so" for number in range(1, build.MAX_KEPT)}
    assert {file.name for file in folders[1].iterdir()} == {*kept, path.name}


def test_a_compiler_that_fails_is_reported_and_pytorch_goes_on(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.c"
    bad.write_text("int broken(")
    monkeypatch.setattr(build, "SOURCES", [bad])
    with pytest.raises(build.BuildFailed, match=r"bad\.c"):
        build.build_library()
    assert build.load_library() is None
    assert list(folders[1].iterdir()) == []


def test_a_machine_without_a_compiler_is_told_what_to_install(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["build"])
    assert build_kernels.main() == 0  # PyTorch computes the same
    assert "install gcc" in capsys.readouterr().out
    assert build.load_library() is None


def test_the_command_builds_and_the_status_names_the_library(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for options in (["--status"], [], ["--status"]):
        monkeypatch.setattr(sys, "argv", ["build_kernels", *options])
        assert build_kernels.main() == 0
        printed.append(capsys.readouterr().out)
    assert "not built yet" in printed[0]
    assert printed[1] == printed[2]
    assert str(folders[1]) in printed[1]
