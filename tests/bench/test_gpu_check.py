"""Every part of the GPU check produces its figures, at toy sizes on a CPU."""

import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.sizes import TOY
from bench.gpu.thresholds import checks_of
from bench.gpu_check import NO_GPU, main, show

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240
Json = dict[str, Any]  # Any: open-ended JSON
PARTS = ["steps", "losses", "whole_run", "trl", "engine", "graphs", "services", "scaling"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Json:
    path = tmp_path_factory.mktemp("gpu") / "report.json"
    done = subprocess.run(
        [sys.executable, "bench/gpu_check.py", "--toy", "--json", path, "--part", *PARTS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: Json = json.loads(path.read_text())
    return found


def test_every_part_ends_and_is_reported(report: Json) -> None:
    assert report["failed"] == {}
    assert report.keys() >= set(PARTS)


def test_steps_have_speed_phases_waits_and_memory(report: Json) -> None:
    assert len(report["steps"]) == 2 * len(TOY.batch_tokens)
    for step in report["steps"]:
        assert step["tokens_per_second"] > 0
        assert 0 < step["mfu"] < 1
        assert step["phase_ms"].keys() == {
            "batch", "teacher", "student forward", "loss", "backward", "optimizer"
        }  # fmt: skip
        assert math.isfinite(step["waits_per_step"])
        assert min(step["peak_bytes"], step["estimated_bytes"]) > 0


def test_a_stopped_run_is_resumed_to_its_end(report: Json) -> None:
    run = report["whole_run"]
    assert run["stopped_at_step"] < run["last_step"] == run["num_steps"]
    assert run["stopped"]["layer_fit"]["seconds"] > 0
    for part in ("stopped", "resumed"):
        assert run[part]["training"]["peak_bytes"] > 0
    assert run["resumed"]["evaluation"]["seconds"] > 0
    assert math.isfinite(run["kl_student"])


def test_the_fused_loss_is_the_plain_one(report: Json) -> None:
    fused, plain = (report["losses"]["entries"][name] for name in ("fused", "plain"))
    for key in ("loss", "gradient_norm"):
        assert fused[key] == pytest.approx(plain[key], rel=1e-4)


def test_engine_and_two_processes_have_their_speeds(report: Json) -> None:
    rates = report["engine"]["tokens_per_second"]
    assert list(rates) == [str(number) for number in TOY.callers]
    assert min(rates.values()) > 0
    assert report["scaling"]["ratio"] > 0


def test_steps_with_and_without_graphs_are_compared(report: Json) -> None:
    graphs = report["graphs"]
    callers = [str(number) for number in TOY.callers]
    assert list(graphs["ratio"]) == callers
    for rates in graphs["tokens_per_second"].values():
        assert list(rates) == callers
        assert min(rates.values()) > 0


def test_figures_within_their_bounds_pass_and_others_fail(report: Json) -> None:
    """The bounds are for GPUs, so the figures of a step are replaced."""
    good = deepcopy(report)
    for step in good["steps"]:
        step |= {"mfu": 0.9, "waits_per_step": 1.0, "peak_bytes": 10, "estimated_bytes": 11}
    good["scaling"]["ratio"] = 1.9
    good["graphs"] |= {"num_failed": 0, "bandwidth_share": 0.4}
    good["graphs"]["ratio"] = dict.fromkeys(good["graphs"]["ratio"], 2.5)
    assert all(check.has_passed for check in checks_of(good))
    bad = deepcopy(good)
    bad["steps"][0]["waits_per_step"] = 2.0
    bad["steps"][-1]["mfu"] = math.nan
    bad["graphs"] |= {"num_failed": 1, "ratio": {"1": 1.5, "4": 1.3}}
    assert [check.has_passed for check in checks_of(bad)].count(False) == 4


def test_without_a_gpu_nothing_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench/gpu_check.py"])
    assert main() == NO_GPU
    assert capsys.readouterr().out == "there is no CUDA device, so nothing was checked\n"


def test_reasons_for_missing_comparisons_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show("scaling", {"not_compared": ["this machine has only one GPU"]})
    show("trl", {"ms_per_step": 2.0})
    assert capsys.readouterr().out.splitlines() == [
        "scaling: not compared, because this machine has only one GPU",
        'trl: {"ms_per_step": 2.0}',
    ]
