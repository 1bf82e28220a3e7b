"""Runs of two processes on a CPU, against the same runs of one."""

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from worker.distill.training.checkpoint import load_state
from worker.protocol.run_lines import (
    CheckpointLine,
    ErrorLine,
    MetricsLine,
    ResultLine,
    RunLine,
    StageLine,
    StoppedLine,
    run_line,
)

Json = dict[str, Any]  # Any: open-ended JSON


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def module_spec(folder: Path, tiny_llama_dir: Path) -> Json:
    """Six steps of few rows, some of fewer rows than there are processes; the teacher answers."""
    rows = [{"prompt": f"Who keeps house number {i}{' and the jar' * (i % 5)}?"} for i in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    numbers: Json = {"n_epochs": 9, "max_steps": 6, "batch_tokens": 100, "learning_rate": 3e-3}
    numbers["precision"] = (
        "float32"  # what a batch is cut into shows in the last of bfloat16's 8 bits
    )
    return {
        "distillation": {
            "teacher": "tiny",
            "student": {"freeze_head": False},
            "data": {"max_new_tokens": 8},
            "hyperparameters": {**numbers, "eval_steps": 3, "checkpoint_steps": 3},
            "evaluation": {"metrics": ["perplexity", "agreement"], "num_samples": 0},
        },
        "teacher_dir": str(tiny_llama_dir),
        "start_dir": str(tiny_llama_dir),
        "training_path": str(folder / "rows.jsonl"),
        "cache_dir": str(folder / "cache"),
        "num_threads": 1,
        "num_processes": 2,
    }


@pytest.fixture
def spec(module_spec: Json) -> Json:
    return copy.deepcopy(module_spec)


@pytest.fixture(scope="module")
def whole(module_spec: Json, folder: Path) -> list[RunLine]:
    """What a run of two processes says, whose files are in `folder / "whole"`."""
    with start(module_spec, folder / "whole") as process:
        lines = finish(process)
    assert process.returncode == 0
    return lines


def start(spec: Json, out: Path) -> subprocess.Popen[str]:
    path = out.with_suffix(".json")
    path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "worker.train", str(path), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[RunLine]:
    output, errors = process.communicate(timeout=120)
    print(errors)
    return [run_line.validate_json(line) for line in output.splitlines()]


def read_until(process: subprocess.Popen[str], kind: type[RunLine]) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        if isinstance(run_line.validate_json(text), kind):
            return
    raise AssertionError(f"no {kind.__name__} came")


def metrics(lines: list[RunLine], name: str) -> list[float]:
    return [
        line.values[name] for line in lines if isinstance(line, MetricsLine) and name in line.values
    ]


def stages(lines: list[RunLine]) -> list[str]:
    return [line.name for line in lines if isinstance(line, StageLine)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def test_two_processes_train_what_one_trains(
    spec: Json, folder: Path, whole: list[RunLine]
) -> None:
    with start(
        spec | {"num_processes": 1, "cache_dir": str(folder / "other")}, folder / "one"
    ) as process:
        alone = finish(process)
    assert stages(whole) == stages(alone)
    assert "generating_teacher_data" in stages(whole)
    for name in ("train_loss", "train_agreement", "grad_norm", "valid_kl"):
        assert metrics(whole, name) == pytest.approx(metrics(alone, name), rel=1e-4)
    other = weights(folder / "one")
    for name, tensor in weights(folder / "whole").items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5)
    assert isinstance(whole[-1], ResultLine)
    assert isinstance(alone[-1], ResultLine)
    assert whole[-1].trained_tokens == alone[-1].trained_tokens
    for name in ("num_train_rows", "num_steps", "best_step"):
        assert whole[-1].result[name] == alone[-1].result[name]


@pytest.mark.usefixtures("whole")
def test_only_the_first_process_asks_the_teacher(folder: Path) -> None:
    (path,) = (folder / "cache" / "answers").glob("*.jsonl")
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines() if line]
    assert len(keys) == len(set(keys)) == 30


@pytest.mark.usefixtures("whole")
def test_a_resumed_run_of_two_has_the_bits_of_one_that_never_stopped(
    spec: Json, folder: Path
) -> None:
    state = load_state(folder / "whole" / "step-3")
    assert (state.step, state.num_processes) == (3, 2)
    with start(
        spec | {"resume_dir": str(folder / "whole" / "step-3")}, folder / "again"
    ) as process:
        finish(process)
    for name in ("optimizer.safetensors", "model/model.safetensors"):
        one, other = (load_file(folder / out / "step-6" / name) for out in ("whole", "again"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.usefixtures("whole")
def test_two_processes_stop_at_the_same_step_and_leave_a_checkpoint(
    spec: Json, folder: Path
) -> None:
    spec["distillation"]["hyperparameters"] |= {"n_epochs": 1000, "max_steps": None}
    with start(spec, folder / "stopped") as process:
        read_until(process, CheckpointLine)
        process.send_signal(signal.SIGTERM)
        lines = finish(process)
    assert process.returncode == 0
    stopped = lines[-1]
    assert isinstance(stopped, StoppedLine)
    assert load_state(folder / "stopped" / f"step-{stopped.step}").step == stopped.step


@pytest.mark.usefixtures("whole")
def test_a_process_that_dies_ends_the_run_as_it_died(spec: Json, folder: Path) -> None:
    spec["distillation"]["hyperparameters"] |= {"n_epochs": 1000, "max_steps": None}
    with start(spec, folder / "dead") as process:
        read_until(process, CheckpointLine)
        ranks = psutil.Process(process.pid).children()
        victim = next(rank for rank in ranks if rank.cmdline()[-2:] == ["--rank", "1"])
        victim.kill()
        finish(process)
    assert process.returncode == -signal.SIGKILL
    assert not [rank for rank in ranks if rank.is_running()]


def test_what_is_wrong_is_said_once(spec: Json, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"nothing": 1}\n')
    with start(spec | {"training_path": str(tmp_path / "rows.jsonl")}, tmp_path / "out") as process:
        lines = finish(process)
    assert process.returncode == 1
    assert [line.code for line in lines if isinstance(line, ErrorLine)] == ["invalid_training_file"]


def test_a_full_disk_under_any_process_is_said(spec: Json, tmp_path: Path) -> None:
    # The file has the answers: each process stores its teacher rows while it trains.
    rows = [{"prompt": f"Who is {i}?", "completion": f"The keeper of {i}."} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spec["distillation"] |= {"data": {}}
    spec |= {"training_path": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")}
    with start(spec, tmp_path / "out") as process:
        read_until(process, StageLine)
        ranks = psutil.Process(process.pid).children()
        other = next(rank for rank in ranks if rank.cmdline()[-2:] == ["--rank", "1"])
        other.rlimit(psutil.RLIMIT_FSIZE, (64, 64))  # the kernel refuses as it does on a full disk
        lines = finish(process)
    assert process.returncode != 0
    assert [line.code for line in lines if isinstance(line, ErrorLine)] == ["disk_full"]
