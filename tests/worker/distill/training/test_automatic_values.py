"""Which values are chosen for a job that leaves them open, and the reasons in its events and result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.contracts.distillation import Hyperparameters
from tests.worker.memory_sink import MemorySink
from worker.distill.pipeline import distil
from worker.distill.student_runs import plan_student_runs
from worker.distill.training.automatic_values import (
    FITTED_LAYERS,
    NEWEST_DEFAULTS,
    decide_eval_steps,
    decide_learning_rate,
    peak_learning_rate,
)
from worker.distill.training.checkpoint import TrainState, file_sha256, load_state
from worker.protocol.run_lines import MessageLine
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

Run = Callable[..., MemorySink]
MakeSpec = Callable[..., RunSpec]
Json = dict[str, Any]  # Any: open-ended JSON
AUTO = {"learning_rate": "auto", "batch_tokens": "auto", "precision": "auto"}
HALVES = {"num_layers": 2, "fit_rows": 7}


@pytest.mark.parametrize(
    ("student", "num_fitted", "rate", "reason"),
    [
        (
            {"num_layers": 2},
            2,
            FITTED_LAYERS[NEWEST_DEFAULTS],
            "the student starts from fitted layers",
        ),
        ({"num_layers": 1}, 1, 1e-3, "the student starts from fitted layers"),
        ({"num_layers": 2}, 0, 1e-3, "more than a third of the layers, and they are not fitted"),
        ({"num_layers": 1}, 0, 2e-3, "at most a third of the layers, and they are not fitted"),
        ({"init": "checkpoint"}, 0, 1e-4, "starts from a whole model"),
        ({"init": "lora"}, 0, 5e-4, "adapters are trained"),
        ({"init": "width", "intermediate_size": 64}, 0, 1e-3, "a narrower copy"),
        (
            {"init": "fresh", "config": {"family": "llama", "hidden_size": 1152, "num_heads": 4}},
            0,
            5e-4,
            "starts from random weights, and its width is 1152",
        ),
    ],
)
def test_the_learning_rate_depends_on_the_start(
    make_spec: MakeSpec, student: Json, num_fitted: int, rate: float, reason: str
) -> None:
    spec = make_spec({"student": student}, learning_rate="auto")
    (run,) = plan_student_runs(spec)
    state = TrainState(num_fitted_layers=num_fitted, defaults_version=NEWEST_DEFAULTS)
    h = spec.distillation.hyperparameters
    decision = decide_learning_rate(h, run.recipe, run.recipe.build(), state)
    assert decision.value == pytest.approx(rate)
    assert reason in decision.reason


@pytest.mark.parametrize(
    ("h", "state", "rate"),
    [
        ({}, {}, 1e-4),
        ({}, {"batch_tokens": 1024}, 1e-4),  # as on a CPU
        ({}, {"batch_tokens": 4096}, 2e-4),
        ({"learning_rate_multiplier": 0.5}, {"batch_tokens": 4096}, 1e-4),
        ({}, {"batch_tokens": 64 * 8192}, 1e-4 * 8**0.5),
        ({}, {"batch_tokens": 4096, "defaults_version": 2}, 1e-4),
        ({"batch_tokens": 4096}, {"batch_tokens": 4096}, 1e-4),
        ({"batch_rows": 8}, {"batch_tokens": 4096}, 1e-4),
        ({"learning_rate": 3e-4}, {"batch_tokens": 4096}, 3e-4),
    ],
)
def test_the_learning_rate_follows_the_square_root_of_automatic_batches(
    make_spec: MakeSpec, h: Json, state: Json, rate: float
) -> None:
    asked = {"learning_rate": "auto", "batch_tokens": "auto", **h}
    spec = make_spec({"student": {"init": "checkpoint"}}, **asked)
    (run,) = plan_student_runs(spec)
    progress = TrainState(**{"defaults_version": NEWEST_DEFAULTS, **state})
    values = spec.distillation.hyperparameters
    model = run.recipe.build()
    assert peak_learning_rate(values, run.recipe, model, progress) == pytest.approx(rate)
    if h.get("learning_rate") is None:
        decision = decide_learning_rate(values, run.recipe, model, progress)
        is_raised = not h.get("learning_rate_multiplier") and rate > 1e-4
        assert is_raised == decision.reason.endswith(
            f"its batches have {progress.batch_tokens or 0:,} tokens"
        )


@pytest.mark.parametrize(
    ("h", "eval_steps", "total_steps", "reason"),
    [
        ({}, 1, 6, "the training is short"),
        ({}, 10, 100, "they take at most 15% of the time"),
        ({}, 34, 100, "more would take over 15% of the time"),
        ({"early_stopping": {}}, 10, 100, "early stopping counts evaluations"),
    ],
)
def test_the_number_of_evaluations_has_a_reason(
    h: Json, eval_steps: int, total_steps: int, reason: str
) -> None:
    decision = decide_eval_steps(Hyperparameters(**h), eval_steps, total_steps)
    assert decision.reason == reason


def test_each_decision_is_an_event_and_part_of_the_result(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    sink = MemorySink()
    spec = make_spec({"student": HALVES}, max_steps=20, **AUTO)
    result = distil(spec, tmp_path / "out", sink, EngineSampler, lambda: False).result
    decided = {decision["option"]: decision["value"] for decision in result["decisions"]}
    assert set(decided) == {
        "objective.teacher_signal",
        "hyperparameters.precision",
        "hyperparameters.batch_tokens",
        "student.layers",
        "hyperparameters.learning_rate",
        "hyperparameters.eval_steps",
    }
    assert decided["objective.teacher_signal"] == "logits"
    assert len(decided["student.layers"]["layers"]) == 2
    assert decided["hyperparameters.learning_rate"] == pytest.approx(FITTED_LAYERS[NEWEST_DEFAULTS])
    events = [line for line in sink.lines if isinstance(line, MessageLine)]
    told = [line.data for line in events if "option" in line.data]
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(result["decisions"]))
    assert all(", because " in line.message for line in events if "option" in line.data)


def test_requested_values_are_no_decisions(make_spec: MakeSpec, tmp_path: Path) -> None:
    block = {
        "student": {"layers": [0, 3]},
        "objective": {"teacher_signal": "text", "ce_weight": 1.0},
    }
    sink = MemorySink()
    spec = make_spec(block, max_steps=2, eval_steps=2)
    result = distil(spec, tmp_path / "out", sink, EngineSampler, lambda: False).result
    assert result["decisions"] == []


def test_a_job_from_before_keeps_its_values(
    run: Run, make_spec: MakeSpec, tmp_path: Path, series: Callable[[MemorySink, str], list[float]]
) -> None:
    block = {"student": HALVES}
    run(make_spec(block, {"keep_checkpoints": 9}, max_steps=4, **AUTO), out="first")
    folder = tmp_path / "first" / "step-2"
    assert load_state(folder).defaults_version == NEWEST_DEFAULTS
    # what a version without these fields has written
    state = json.loads((folder / "state.json").read_text())
    del state["defaults_version"], state["decisions"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry["sha256"] = file_sha256(folder / entry["path"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    spec = make_spec(block, {"resume_dir": folder}, max_steps=4, **AUTO)
    sink = MemorySink()
    result = distil(spec, tmp_path / "second", sink, EngineSampler, lambda: False).result
    decided = {decision["option"]: decision["value"] for decision in result["decisions"]}
    assert decided["hyperparameters.learning_rate"] == pytest.approx(5e-4)
    assert max(series(sink, "learning_rate")) <= 5e-4
    assert not any("option" in line.data for line in sink.lines if isinstance(line, MessageLine))
    assert load_state(tmp_path / "second" / "step-4").defaults_version == 1
