"""Runs the cases of tests/device once, in child processes with a pretended GPU."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.device.shim import compile_shim
from tests.tiny import save_tiny

Json = dict[str, Any]  # Any: open-ended JSON
FAMILIES = ("llama", "t5", "bert")
SECONDS = 240


@pytest.fixture(scope="session")
def observations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    """What each case of tests/device/cases.py has observed, by its name."""

    def prepare(folder: Path) -> None:
        for family in FAMILIES:
            save_tiny(folder / family, family)

    return run_cases("tests.device.cases", tmp_path_factory, prepare)


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    """The memory of a step of each pair of tests/device/memory_cases.py."""
    return run_cases("tests.device.memory_cases", tmp_path_factory)


def run_cases(
    module: str,
    tmp_path_factory: pytest.TempPathFactory,
    prepare: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Json]:
    """Returns what the cases of a module have observed. All processes of pytest-xdist share it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the stand-in for CUDA needs a C++ compiler (g++)")
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / module
    folder.mkdir(exist_ok=True)
    output = folder / "observations.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            prepare(folder)
            done = subprocess.run(
                [sys.executable, "-m", module, compile_shim(compiler), folder, output],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert done.returncode == 0, done.stderr
    seen: dict[str, Json] = json.loads(output.read_text())
    return seen


@pytest.fixture
def observed(observations: dict[str, Json]) -> Callable[[str], Json]:
    """A function that gives the observations of one case, or fails with the case's traceback."""

    def of(case: str) -> Json:
        seen = observations[case]
        assert "error" not in seen, seen["error"]
        return seen

    return of
