"""Jobs of more than one student: ladders, gates and baselines, and where they go on when they were killed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.memory_sink import FaultAtStage, MemorySink
from worker.distill.pipeline import Outcome, distil
from worker.distill.training.checkpoint import load_state
from worker.distill.training.trainer import Stopped
from worker.errors import EvaluationFailed, GateFailed, NanLoss, StudentTooDeep
from worker.protocol.run_lines import (
    CheckpointLine,
    MessageLine,
    MetricsLine,
    ProgressLine,
    StageLine,
)
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

Json = dict[str, Any]  # Any: open-ended JSON
MakeSpec = Callable[..., RunSpec]
Run = Callable[..., tuple[Outcome, MemorySink]]
JUDGED: Json = {"metrics": ["agreement"], "num_samples": 0}
STEPS = {
    "n_epochs": 20,
    "max_steps": 6,
    "batch_tokens": 512,
    "eval_steps": 3,
    "checkpoint_steps": 3,
}


def ladder(*sizes: int, **evaluation: Any) -> Json:
    return {"student": {"num_layers": list(sizes)}, "evaluation": {**JUDGED, **evaluation}}


@pytest.fixture
def run_job(tmp_path: Path) -> Run:
    """A function that runs a spec to its end; gives the outcome, as a client gets it, and the lines."""

    def run(spec: RunSpec, out: str = "out", sink: MemorySink | None = None, **more: Any) -> Any:
        sink = sink or MemorySink()
        outcome = distil(
            spec, tmp_path / out, sink, EngineSampler, more.get("should_stop", lambda: False)
        )
        return outcome, sink

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def lines(sink: MemorySink, kind: type[Any]) -> list[Any]:  # Any: lines of that kind
    return [line for line in sink.lines if isinstance(line, kind)]


def notes(sink: MemorySink) -> list[str]:
    """Returns the messages that report no decision."""
    return [line.message for line in lines(sink, MessageLine) if "option" not in line.data]


def test_a_ladder_is_chosen_on_held_out_rows_and_judged_on_test_rows(
    run_job: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "Other {i}?", "completion": "Jar {i}."}}\n' for i in range(5))
    )
    block = ladder(1, 2, choose="best", ce_baseline=True)
    plain, _ = run_job(make_spec(block, **STEPS), out="plain")
    outcome, sink = run_job(make_spec(block, spec={"test_path": path}, **STEPS))
    result = json.loads(json.dumps(outcome.result))
    tests = [entry.pop("test") for entry in result["ladder"]]
    seconds = {"train_seconds"}
    assert [{k: v for k, v in e.items() if k not in seconds} for e in result["ladder"]] == [
        {k: v for k, v in e.items() if k not in seconds}
        for e in json.loads(json.dumps(plain.result["ladder"]))
    ]
    (chosen,) = [i for i, entry in enumerate(result["ladder"]) if entry["chosen"]]
    assert result["student"] == tests[chosen]
    assert result["validation"]["student"].items() <= result["ladder"][chosen].items()
    assert set(result["differences"]) == {"untrained", "ce_baseline"}
    percents = [line.percent for line in lines(sink, ProgressLine)]
    assert percents == sorted(percents)
    plotted = json.loads((tmp_path / "out" / "ladder.json").read_text())["students"]
    assert [point["figures"]["kl"] for point in plotted] == [entry["kl"] for entry in tests]


def test_a_ladder_is_taught_by_one_pass_of_its_teacher(
    run_job: Run, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.protocol.run_lines.PROGRESS_SECONDS", 0.0)
    outcome, sink = run_job(make_spec(ladder(3, 1, 2), **STEPS))
    result = json.loads(json.dumps(outcome.result))
    assert (result["num_teacher_rows_computed"], result["teacher_passes"]) == (40, 1.0)
    assert [entry["num_layers"] for entry in result["ladder"]] == [1, 2, 3]
    # no gate: the smallest
    assert [entry["chosen"] for entry in result["ladder"]] == [
        True,
        False,
        False,
    ]
    layers = [entry["decisions"][0]["value"]["layers"] for entry in result["ladder"]]
    assert layers == [[0], [0, 3], [0, 1, 3]]
    assert [decision["option"] for decision in result["decisions"]] == [
        "objective.teacher_signal",
        "student.layers",
    ]
    chosen = result["ladder"][0]
    assert result["student"].items() <= chosen.items()
    assert {
        "label",
        "num_parameters",
        "weights_bytes",
        "kl",
        "agreement",
        "intervals",
        "passed",
    } <= chosen.keys()
    assert_same_bits(tmp_path / "out" / "student", tmp_path / "out" / "finished" / "0")
    assert outcome.files == ("ladder.png", "ladder.json")
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in outcome.files)
    assert notes(sink) == [
        "training student of 1 layer (1 of 3)",
        "training student of 2 layers (2 of 3)",
        "training student of 3 layers (3 of 3)",
    ]
    assert [line.name for line in lines(sink, StageLine)] == [
        "loading_models", *["training", "evaluating"] * 3, "exporting",
    ]  # fmt: skip
    told = lines(sink, ProgressLine)
    assert [line.percent for line in told] == sorted(line.percent for line in told)
    trained = [line for line in told if line.total_steps]
    assert {line.total_steps for line in trained} == {20}
    assert trained[-1].step == 20
    assert [line.step for line in lines(sink, CheckpointLine)] == [3, 6, 10, 13, 17, 20]
    points = [(line.step, name) for line in lines(sink, MetricsLine) for name in line.values]
    assert len(points) == len(set(points))
    assert [step for step, name in points if name == "valid_kl"] == [0, 3, 6, 7, 10, 13, 14, 17, 20]


class StopAtStep:
    """Asks a run to stop once it has told the metrics of a step."""

    def __init__(self, step: int) -> None:
        self.sink = MemorySink()
        self.step = step

    def __call__(self) -> bool:
        return any(line.step >= self.step for line in lines(self.sink, MetricsLine))


def test_a_job_killed_in_any_run_ends_with_the_bits_of_one_that_was_not(
    run_job: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(ladder(1, 2, choose="best", ce_baseline=True), **STEPS)
    whole, _ = run_job(spec, out="whole")
    assert whole.result["ladder"][1]["chosen"]
    students = ("student", "finished/0", "finished/1", "step-20/model")
    # before the second student's run, in it, in the baseline's
    for stop_step, newest in ((7, 6), (11, 11), (18, 18)):
        stop = StopAtStep(stop_step)
        with pytest.raises(Stopped) as stopped:
            run_job(spec, out="first", sink=stop.sink, should_stop=stop)
        assert stopped.value.step == stop_step
        checkpoint = shutil.copytree(
            tmp_path / "first" / f"step-{newest}", tmp_path / str(stop_step) / f"step-{newest}"
        )
        shutil.rmtree(tmp_path / "first")  # the checkpoint is all that is left
        resumed, _ = run_job(
            spec.model_copy(update={"resume_dir": checkpoint}), out=f"{stop_step}/out"
        )
        for name in students:
            assert_same_bits(tmp_path / "whole" / name, tmp_path / str(stop_step) / "out" / name)
        assert resumed.result["num_teacher_rows_computed"] == 0
        assert resumed.trained_tokens == whole.trained_tokens
        assert resumed.result["ce_baseline"] == whole.result["ce_baseline"]
        for ours, theirs in zip(resumed.result["ladder"], whole.result["ladder"], strict=True):
            assert {**ours, "train_seconds": 0} == {**theirs, "train_seconds": 0}


def test_a_resumed_job_names_the_layers_only_once_and_keeps_them(
    run_job: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    block = {**ladder(1, 2), "student": {"num_layers": [1, 2], "fit_rows": "auto"}}
    spec = make_spec(block, **STEPS)
    stop = StopAtStep(4)
    with pytest.raises(Stopped):
        run_job(spec, out="first", sink=stop.sink, should_stop=stop)
    resume_dir = tmp_path / "first" / "step-4"
    before = load_state(resume_dir).kept_layers
    assert before is not None
    assert [len(kept.layers or ()) for kept in before] == [1, 2]
    _, sink = run_job(spec.model_copy(update={"resume_dir": resume_dir}), out="second")
    told = [
        sum("kept layers" in line.message for line in lines(one, MessageLine))
        for one in (stop.sink, sink)
    ]
    assert told == [2, 0]
    last = lines(sink, CheckpointLine)[-1]
    assert load_state(tmp_path / "second" / last.folder).kept_layers == before


def test_the_smallest_student_that_passes_the_gate_is_chosen(
    run_job: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    free, _ = run_job(make_spec(ladder(1, 2, 3), **STEPS), out="free")
    kl = [entry["kl"] for entry in free.result["ladder"]]
    assert kl == sorted(kl, reverse=True)
    gate = {"metric": "kl", "at_most": (kl[0] + kl[1]) / 2}
    gated, _ = run_job(make_spec(ladder(1, 2, 3, gate=gate), **STEPS), out="gated")
    assert [entry["passed"] for entry in gated.result["ladder"]] == [False, True, True]
    assert gated.result["student"]["num_layers"] == 2
    assert_same_bits(tmp_path / "gated" / "student", tmp_path / "free" / "finished" / "1")
    assert json.loads((tmp_path / "gated" / "ladder.json").read_text())["gate"]["metric"] == "kl"


@pytest.mark.parametrize(
    "student", [{"num_layers": [1, 2]}, {"num_layers": 2}], ids=["ladder", "single"]
)
def test_a_job_without_a_student_that_passes_fails_and_says_how_near_it_came(
    run_job: Run, make_spec: MakeSpec, tmp_path: Path, student: Json
) -> None:
    gate = {"metric": "agreement", "at_least": 0.999}
    sink = MemorySink()
    with pytest.raises(
        GateFailed, match=r"at least 0.999, but the best is 0\.\d+ \((1 layer|student)\)"
    ):
        run_job(
            make_spec({"student": student, "evaluation": {**JUDGED, "gate": gate}}, **STEPS),
            sink=sink,
        )
    assert GateFailed.code == "gate_failed"
    last = lines(sink, CheckpointLine)[-1]
    assert load_state(tmp_path / "out" / last.folder).step == 6
    assert not (tmp_path / "out" / "student").exists()


def test_a_gate_on_labels_that_are_none_fails_before_the_training(
    run_job: Run, make_spec: MakeSpec
) -> None:
    gate = {"metric": "accuracy", "at_least": 0.5}
    sink = MemorySink()
    with pytest.raises(GateFailed, match="not labels"):
        run_job(
            make_spec({"evaluation": {"metrics": ["accuracy"], "gate": gate}}, **STEPS), sink=sink
        )
    assert not lines(sink, MetricsLine)


def test_a_ladder_with_an_impossible_size_fails_before_anything_is_answered(
    run_job: Run, make_spec: MakeSpec
) -> None:
    sink = MemorySink()
    with pytest.raises(StudentTooDeep):
        run_job(make_spec({**ladder(2, 5), "data": {"completions": "teacher"}}, **STEPS), sink=sink)
    assert [line.name for line in lines(sink, StageLine)] == ["loading_models"]


def test_a_baseline_is_not_fitted_because_that_would_be_teaching(
    run_job: Run, make_spec: MakeSpec
) -> None:
    block = {"student": {"fit_rows": "auto"}, "evaluation": {**JUDGED, "ce_baseline": True}}
    _, sink = run_job(make_spec(block, **{**STEPS, "max_steps": 2}))
    assert sum("in closed form" in line.message for line in lines(sink, MessageLine)) == 1


def test_a_baseline_is_the_same_student_without_its_teacher(
    run_job: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    steps = {**STEPS, "max_steps": 12}
    outcome, sink = run_job(make_spec({"evaluation": {**JUDGED, "ce_baseline": True}}, **steps))
    result = outcome.result
    assert result["teacher_passes"] == 1.0
    assert result["ce_baseline"]["num_parameters"] == result["student"]["num_parameters"]
    assert result["student"]["kl"] < result["ce_baseline"]["kl"]
    assert set(result["differences"]) == {"untrained", "ce_baseline"}
    assert result["num_steps"] == 12
    assert notes(sink) == [
        "training student (1 of 2)",
        "training the baseline on the text only (2 of 2)",
    ]
    text = {"objective": {"teacher_signal": "text"}, "evaluation": JUDGED}
    alone, _ = run_job(make_spec(text, **steps), out="text")
    assert outcome.trained_tokens == 2 * alone.trained_tokens
    assert_same_bits(
        tmp_path / "out" / "step-25" / "model", tmp_path / "text" / "step-12" / "model"
    )


def test_a_loss_that_is_no_number_in_a_later_run_leaves_the_last_checkpoint(
    run_job: Run, make_spec: MakeSpec, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    broken = shutil.copytree(tiny_llama_dir, tmp_path / "broken")
    tensors = weights(broken)
    # the first student has no such layer
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    sink = MemorySink()
    with pytest.raises(NanLoss, match="at step 7"):
        run_job(make_spec(ladder(1, 2), spec={"start_dir": broken}, **STEPS), sink=sink)
    last = lines(sink, CheckpointLine)[-1]
    assert last.step == 6
    assert load_state(tmp_path / "out" / last.folder).step == 6


def test_evaluations_that_failed_are_repeated_when_the_job_is_resumed(
    run_job: Run, make_spec: MakeSpec, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_llama_dir, tmp_path / "teacher")
    block = ladder(1, 2, gate={"metric": "kl", "at_most": 1e9})
    folders = {"teacher_dir": teacher, "start_dir": tiny_llama_dir}
    spec = make_spec(block, spec=folders, **STEPS)
    teachers_weights = teacher / "model.safetensors"
    content = teachers_weights.read_bytes()
    sink = FaultAtStage("evaluating", lambda: teachers_weights.write_bytes(b"damaged"))
    with pytest.raises(EvaluationFailed, match="1 layer, 2 layers"):
        run_job(spec, sink=sink)
    teachers_weights.write_bytes(content)
    newest = max((tmp_path / "out").glob("step-*"), key=lambda folder: load_state(folder).job_step)
    resumed, _ = run_job(spec.model_copy(update={"resume_dir": newest}), out="resumed")
    assert [entry["passed"] for entry in resumed.result["ladder"]] == [True, True]
    assert all(entry["kl"] > 0 for entry in resumed.result["ladder"])
    assert "missing" not in resumed.result


def test_a_baseline_that_fails_leaves_the_student(
    run_job: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec({"evaluation": {**JUDGED, "ce_baseline": True}}, **STEPS)
    sink = BreakBaseline(tmp_path / "out")
    outcome, _ = run_job(spec, sink=sink)
    (missing,) = outcome.result["missing"]
    assert (missing["part"], missing["code"]) == ("ce_baseline", "baseline_failed")
    assert outcome.result["student"]["kl"] > 0
    assert weights(tmp_path / "out" / "student")


class BreakBaseline(MemorySink):
    """Puts a file where the baseline's first checkpoint is to be written."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out

    def __call__(self, line: Any, /) -> None:  # Any: a RunLine
        super().__call__(line)
        if isinstance(line, MessageLine) and "baseline" in line.message:
            (self.out / ".step-10.partial").write_text("in the way")
