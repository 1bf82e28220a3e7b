import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from app.contracts.distillation import EarlyStopping, TeacherSignal
from tests.worker.memory_sink import MemorySink
from worker.cpu import HAS_BFLOAT16
from worker.distill.data.rows import Encoder, read_rows, split_rows
from worker.distill.evaluation.held_out import HeldOut, stopping_score
from worker.distill.students.layer_dropping import keep_layers
from worker.distill.students.recipe import freeze_head, load_model
from worker.distill.teachers.signals import Signal
from worker.distill.training.checkpoint import load_state
from worker.distill.training.lr_schedule import scheduled
from worker.distill.training.trainer import Stopped
from worker.errors import NanLoss
from worker.models.adapters import read_adapters
from worker.protocol.run_lines import (
    CheckpointLine,
    MessageLine,
    MetricsLine,
    ProgressLine,
    RunLine,
)
from worker.protocol.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]
Run = Callable[..., MemorySink]
Series = Callable[[MemorySink, str], list[float]]
HALVES = {
    "n_epochs": 20,
    "max_steps": 10,
    "batch_tokens": 512,
    "eval_steps": 5,
    "checkpoint_steps": 5,
}


class StopAfter:
    """Asks a run to stop once it has said that it took so many steps."""

    def __init__(self, num_steps: int) -> None:
        self.sink = MemorySink()
        self.num_steps = num_steps

    def __call__(self) -> bool:
        steps = [line.step for line in self.sink.lines if isinstance(line, MetricsLine)]
        return bool(steps) and max(steps) >= self.num_steps


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def checkpoints(sink: MemorySink) -> list[CheckpointLine]:
    return [line for line in sink.lines if isinstance(line, CheckpointLine)]


def messages(sink: MemorySink) -> list[str]:
    return [line.message for line in sink.lines if isinstance(line, MessageLine)]


def stop_after(run: Run, spec: RunSpec, num_steps: int, out: str) -> None:
    stop = StopAfter(num_steps)
    with pytest.raises(Stopped) as stopped:
        run(spec, out=out, sink=stop.sink, should_stop=stop)
    assert stopped.value.step == num_steps


def test_a_checkpoint_carries_the_metrics_of_its_own_step_or_none(
    run: Run, make_spec: MakeSpec
) -> None:
    sink = run(
        make_spec(n_epochs=20, max_steps=6, batch_tokens=512, eval_steps=4, checkpoint_steps=1)
    )
    evaluations = {
        line.step: line.values
        for line in sink.lines
        if isinstance(line, MetricsLine) and "valid_kl" in line.values
    }
    assert set(evaluations) == {0, 4, 6}
    metrics = {line.step: dict(line.metrics) for line in checkpoints(sink)}
    for step, values in metrics.items():
        trained = {name: values.pop(name) for name in list(values) if name.startswith("train_")}
        (told,) = [
            line.values
            for line in sink.lines
            if isinstance(line, MetricsLine) and line.step == step and "train_loss" in line.values
        ]
        assert trained.items() <= told.items()
        assert "train_loss" in trained
    assert metrics == {step: evaluations.get(step, {}) for step in range(1, 7)}


def test_the_student_learns(run: Run, make_spec: MakeSpec, series: Series) -> None:
    kl = series(run(make_spec(n_epochs=6)), "valid_kl")
    assert kl[-1] < 0.5 * kl[0]


@pytest.mark.parametrize(
    ("block", "precision"),
    [
        pytest.param({}, "float32", id="frozen head, expected rows"),
        pytest.param({"student": {"freeze_head": False}}, "float32", id="trained head"),
        pytest.param(
            {"objective": {"then": {"divergence": "skew_forward_kl", "at": 0.7}}},
            "float32",
            id="two phases",
        ),
        pytest.param(
            {"student": {"fit_rows": "auto"}}, "auto", id="fitted, in what the machine has"
        ),
    ],
)
def test_a_run_resumed_in_another_process_has_the_bits_of_one_that_never_stopped(
    run: Run, make_spec: MakeSpec, tmp_path: Path, block: dict[str, Any], precision: str
) -> None:
    spec = make_spec(block, **HALVES, precision=precision)
    run(spec, out="whole")
    stop_after(run, spec, 5, out="first")
    shutil.rmtree(spec.cache_dir)  # another machine has no cache
    again = spec.model_copy(update={"resume_dir": tmp_path / "first" / "step-5"})
    (tmp_path / "again.json").write_text(again.model_dump_json())
    command = [
        sys.executable,
        "-m",
        "worker.train",
        f"{tmp_path}/again.json",
        "--out",
        f"{tmp_path}/second",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (
        load_state(tmp_path / "whole" / "step-10").epoch
        > load_state(tmp_path / "first" / "step-5").epoch
    )
    assert_same_bits(
        weights(tmp_path / "whole" / "student"), weights(tmp_path / "second" / "student")
    )
    one, other = (
        load_file(tmp_path / name / "step-10" / "optimizer.safetensors")
        for name in ("whole", "second")
    )
    assert_same_bits(one, other)


def test_a_lora_student_resumes_to_the_same_bits_and_is_saved_as_a_plain_model(
    run: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    block = {"student": {"init": "lora", "lora": {"rank": 4}}}
    run(make_spec(block, **HALVES), out="whole")
    stop = StopAfter(5)
    with pytest.raises(Stopped):
        run(make_spec(block, **HALVES), out="half", sink=stop.sink, should_stop=stop)
    resume = {"resume_dir": tmp_path / "half" / "step-5"}
    run(make_spec(block, resume, **HALVES), out="rest")
    whole = weights(tmp_path / "whole" / "student")
    assert_same_bits(weights(tmp_path / "rest" / "student"), whole)
    assert not any("lora" in name for name in whole)
    one, other = (tmp_path / name / "step-10" / "model" for name in ("whole", "rest"))
    assert_same_bits(read_adapters(one), read_adapters(other))
    assert [path.name for path in one.glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_rows_from_the_cache_train_the_same_bits_as_rows_computed_now(
    run: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    block = {"student": {"freeze_head": False}}  # hidden states are cached in their full precision
    run(make_spec(block, spec={"cache_bytes": 0}), out="live")
    run(make_spec(block), out="filling")
    run(make_spec(block), out="filled")
    assert list((tmp_path / "cache" / "teacher").iterdir())
    assert_same_bits(
        weights(tmp_path / "live" / "student"), weights(tmp_path / "filling" / "student")
    )
    assert_same_bits(
        weights(tmp_path / "live" / "student"), weights(tmp_path / "filled" / "student")
    )


def test_a_frozen_head_stays_the_teachers(run: Run, make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(n_epochs=1)
    run(spec)
    name = "model.embed_tokens.weight"
    assert torch.equal(weights(tmp_path / "out" / "student")[name], weights(spec.teacher_dir)[name])


def test_training_stops_early_and_keeps_the_best(
    run: Run, make_spec: MakeSpec, tmp_path: Path, series: Series
) -> None:
    spec = make_spec(n_epochs=50, eval_steps=2, learning_rate=0.05, early_stopping={"patience": 2})
    sink = run(spec)
    kl = series(sink, "valid_kl")[1:]
    best_step = 2 * (1 + kl.index(min(kl)))
    last = checkpoints(sink)[-1]
    state = load_state(tmp_path / "out" / last.folder)
    assert state.is_done
    assert state.best_step == best_step == last.step - 4
    best = weights(tmp_path / "out" / f"step-{best_step}" / "model")
    assert_same_bits(weights(tmp_path / "out" / "student"), best)
    assert_same_bits(weights(tmp_path / "out" / last.folder / "best"), best)


def test_a_run_resumed_behind_its_best_step_still_gives_the_best(
    run: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(n_epochs=50, eval_steps=2, learning_rate=0.05, early_stopping={"patience": 3})
    run(spec, out="whole")
    best_step = load_state(max((tmp_path / "whole").glob("step-*"), key=_step_of)).best_step
    assert best_step is not None
    stop_after(run, spec, best_step + 3, out="first")
    resumed = spec.model_copy(update={"resume_dir": tmp_path / "first" / f"step-{best_step + 3}"})
    run(resumed, out="second")
    assert_same_bits(
        weights(tmp_path / "whole" / "student"), weights(tmp_path / "second" / "student")
    )


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def test_the_second_phase_changes_the_objective_at_its_step(
    run: Run, make_spec: MakeSpec, series: Series
) -> None:
    then = {"divergence": "skew_forward_kl", "alpha": 0.1, "at": 0.5}
    sink = run(make_spec({"objective": {"then": then}}, max_steps=8, n_epochs=9, batch_tokens=128))
    loss, kl = series(sink, "train_loss"), series(sink, "train_kl")
    assert loss[:4] == kl[:4]
    assert all(skewed < 0.8 * full for skewed, full in zip(loss[4:], kl[4:], strict=True))


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_last_checkpoint(
    run: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    stop_after(run, make_spec(**HALVES), 5, out="first")
    checkpoint = tmp_path / "first" / "step-5"
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "first" / "step-5" / "model", broken)
    tensors = weights(broken)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    block = {"student": {"init": "checkpoint"}}
    with pytest.raises(NanLoss, match="lower the learning rate"):
        run(make_spec(block, spec={"start_dir": broken}, **HALVES), out="first")
    assert load_state(checkpoint).step == 5


def test_only_the_best_and_the_newest_checkpoints_stay(
    run: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    sink = run(make_spec(n_epochs=4, checkpoint_steps=1, eval_steps=1000))
    last = checkpoints(sink)[-1].step
    assert {path.name for path in (tmp_path / "out").glob("step-*")} == {
        f"step-{last - 1}",
        f"step-{last}",
    }


def test_a_resume_with_other_threads_says_so(run: Run, make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(**HALVES)
    stop_after(run, spec, 5, out="first")
    changes = {"resume_dir": tmp_path / "first" / "step-5", "num_threads": 2}
    sink = run(spec.model_copy(update=changes), out="second")
    assert any("1 threads" in line.message for line in sink.lines if isinstance(line, MessageLine))
    sink = run(spec.model_copy(update={**changes, "num_threads": 0}), out="third")
    assert not [line for line in sink.lines if isinstance(line, MessageLine)]
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU does not support bfloat16 matmuls")
def test_a_resumed_run_keeps_the_precision_of_its_checkpoint_or_says_that_it_cannot(
    run: Run, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(**HALVES)
    stop_after(run, spec, 5, out="first")
    resume = {"resume_dir": tmp_path / "first" / "step-5"}
    for name in ("HAS_FAST_BFLOAT16", "TRAINS_IN_BFLOAT16"):
        monkeypatch.setattr(f"worker.distill.training.devices.{name}", True)
    quiet = run(make_spec(spec=resume, **HALVES, precision="auto"), out="second")
    assert load_state(tmp_path / "second" / "step-10").precision == "float32"
    assert not any("bit-identical" in m and "float32" in m for m in messages(quiet))
    other = run(make_spec(spec=resume, **HALVES, precision="bfloat16"), out="third")
    assert load_state(tmp_path / "third" / "step-10").precision == "bfloat16"
    assert any(
        "made in float32 and the run continues in bfloat16" in message
        for message in messages(other)
    )


def test_a_run_in_bfloat16_says_that_the_cpu_does_not_have_it(
    run: Run, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.distill.training.devices.HAS_FAST_BFLOAT16", False)
    told = messages(run(make_spec(**HALVES, precision="bfloat16"), out="first"))
    assert any("does not support bfloat16 matmuls" in message for message in told)


FITTED = {"fit_rows": 7, "layer_choice": "first_and_last"}


def test_a_fitted_student_says_so_and_begins_elsewhere_than_the_plain_one(
    run: Run, make_spec: MakeSpec, tmp_path: Path, series: Series
) -> None:
    sink = run(make_spec({"student": FITTED}, learning_rate="auto", max_steps=2), out="fitted")
    assert any("fitted 2 layers in closed form on 7 rows" in message for message in messages(sink))
    assert load_state(tmp_path / "fitted" / "step-2").num_fitted_layers == 2
    plain = run(make_spec(learning_rate="auto", max_steps=2), out="plain")
    assert load_state(tmp_path / "plain" / "step-2").num_fitted_layers == 0
    assert series(sink, "valid_kl")[0] != series(plain, "valid_kl")[0]
    assert series(sink, "learning_rate")[0] < series(plain, "learning_rate")[0]


def test_progress_rises_to_the_end(
    run: Run, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.protocol.run_lines.PROGRESS_SECONDS", 0.0)
    lines: list[RunLine] = run(make_spec()).lines
    told = [line for line in lines if isinstance(line, ProgressLine)]
    percents = [line.percent for line in told]
    assert percents == sorted(percents)
    assert percents[-1] > 90
    trained = [line for line in told if line.total_steps]
    assert trained[-1].step == trained[-1].total_steps
    assert trained[-1].epoch == 2.0
    assert trained[-1].seconds_remaining == 0.0
    assert trained[-1].tokens_per_second


def test_a_run_that_ends_within_an_epoch_says_how_far_it_came(
    run: Run, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.protocol.run_lines.PROGRESS_SECONDS", 0.0)
    sink = run(make_spec(max_steps=3, batch_tokens=128))
    epochs = [
        line.epoch
        for line in sink.lines
        if isinstance(line, ProgressLine) and line.epoch is not None
    ]
    assert 0.0 < max(epochs) < 0.5


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [scheduled(step, 100, peak=1.0, warmup=0.1) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] < 1e-9


def test_the_first_step_has_the_loss_and_gradient_of_full_logits(
    run: Run, make_spec: MakeSpec, series: Series, tokenizer: PreTrainedTokenizerBase
) -> None:
    spec = make_spec(batch_tokens=100_000, max_steps=1)
    sink = run(spec)
    encoder = Encoder(tokenizer, max_tokens=256)
    rows = [encoder.encode(row) for row in split_rows(read_rows(spec.training_path))[0]]
    teacher = load_model(spec.teacher_dir)
    student = keep_layers(teacher, (0, 3))
    freeze_head(student)
    total = torch.tensor(0.0)
    for row in rows:
        ids_1T, at = torch.tensor([row.token_ids]), torch.tensor(row.target_positions)
        p, q = (m(input_ids=ids_1T).logits[0, at - 1].log_softmax(-1) for m in (teacher, student))
        total = total + (p.detach().exp() * (p.detach() - q)).sum()
    loss = total / sum(row.num_targets for row in rows)
    loss.backward()
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in student.parameters() if p.grad is not None]
    )
    assert series(sink, "train_loss") == [pytest.approx(float(loss.detach()), rel=1e-4)]
    assert series(sink, "grad_norm") == [pytest.approx(float(norm), rel=1e-3)]


@pytest.mark.parametrize("limit", [0.01, 100.0])
def test_a_gradient_is_no_longer_than_it_may_be(
    run: Run, make_spec: MakeSpec, series: Series, tmp_path: Path, limit: float
) -> None:
    sink = run(make_spec(batch_tokens=100_000, max_steps=1, max_grad_norm=limit))
    (norm,) = series(sink, "grad_norm")
    moments = load_file(tmp_path / "out" / "step-1" / "optimizer.safetensors")
    first = torch.cat(
        [each.flatten() for name, each in moments.items() if name.endswith(".exp_avg")]
    )
    # after one step a first moment is 1 - .9 of the gradient
    assert float(first.norm()) == pytest.approx(0.1 * min(norm, limit), rel=1e-4)
    assert 0.01 < norm < 100.0


@pytest.mark.parametrize(
    ("signal", "early", "expected"),
    [
        ("logits", None, 1.0),
        ("text", None, 3.0),
        ("hidden", None, 3.0),
        ("text", EarlyStopping(metric="kl"), 1.0),
    ],
)
def test_a_student_of_text_is_chosen_by_the_text(
    signal: TeacherSignal, early: EarlyStopping | None, expected: float
) -> None:
    held_out = HeldOut(torch.tensor([[2.0, 1.0, 3.0, 0.5]], dtype=torch.float64), torch.tensor([1]))
    assert stopping_score(held_out, early, Signal(signal, "")) == expected
