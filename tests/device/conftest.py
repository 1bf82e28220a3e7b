"""Runs all cases of tests/device once, in a child process with a pretended GPU."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the stand-in for CUDA needs a C++ compiler (g++)")
    folder = tmp_path_factory.mktemp("device")
    for family in FAMILIES:
        save_tiny(folder / family, family)
    output = folder / "observations.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.device.cases", compile_shim(compiler), folder, output],
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
