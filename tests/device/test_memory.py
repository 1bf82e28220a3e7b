"""The estimated GPU memory of training steps, compared with traces of steps of real sizes."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.device.shim import compile_shim

Json = dict[str, Any]  # Any: open-ended JSON
SECONDS = 240
TOLERANCE = 0.1
PAIRS = (
    "7B -> 1B",
    "1.5B -> 0.5B",
    "SmolLM2, 30 -> 15 layers",
    "GPT-2, 12 -> 6 layers",
    "T5, 12 -> 6 layers",
    "1.5B -> 0.5B, activation checkpointing",
    "SmolLM2, accumulated",
    "SmolLM2, LoRA",
)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    """The memory of a step of each pair of tests/device/memory_cases.py."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the stand-in for CUDA needs a C++ compiler (g++)")
    folder = tmp_path_factory.mktemp("memory")
    output = folder / "steps.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.device.memory_cases", compile_shim(compiler), folder, output],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Json] = json.loads(output.read_text())
    return seen


@pytest.mark.parametrize("pair", PAIRS)
def test_the_estimate_is_close_to_a_trace(steps: dict[str, Json], pair: str) -> None:
    step = steps[pair]
    assert "error" not in step, step["error"]
    assert step["estimated"] == pytest.approx(step["traced"], rel=TOLERANCE)


def test_micro_batches_are_accumulated_in_one_case(steps: dict[str, Json]) -> None:
    assert [pair for pair, step in steps.items() if step["num_pieces"] > 1] == [
        "SmolLM2, accumulated"
    ]


def test_all_traced_pairs_are_compared(steps: dict[str, Json]) -> None:
    assert tuple(steps) == PAIRS
