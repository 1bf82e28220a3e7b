"""Pairs of models of different kinds, each as a whole run: the loss falls, and transformers alone loads the student."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderModel,
)

from tests.tiny import save_tiny
from tests.worker.memory_sink import MemorySink
from worker.distill.pipeline import Outcome, distil
from worker.distill.training.checkpoint import load_state
from worker.distill.training.trainer import Stopped
from worker.errors import InvalidStudent, TokenizerMismatch, UnsupportedModel
from worker.protocol.run_lines import MessageLine, ProgressLine, StageLine
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

Json = dict[str, Any]  # Any: open-ended JSON
MakeSpec = Callable[..., RunSpec]
Run = Callable[..., MemorySink]
Series = Callable[[MemorySink, str], list[float]]
FEW = {"max_steps": 8, "n_epochs": 9, "eval_steps": 8, "checkpoint_steps": 8, "learning_rate": 5e-3}
TEXT_LOSS = {"conditional_mlm": "valid_kl", "logits": "valid_kl", "hidden": "valid_perplexity"}


def fresh(family: str, hidden_size: int = 32) -> Json:
    config = {"family": family, "hidden_size": hidden_size, "num_layers": 2, "num_heads": 2}
    return {"init": "fresh", "config": config}


@pytest.fixture
def make_pair(
    make_spec: MakeSpec, write_rows: Callable[..., Path], answered_rows: list[Json], tmp_path: Path
) -> MakeSpec:
    """A function that makes the spec of a run from a tiny teacher of two layers, or four where layers are left out."""

    def make(
        teacher: str, student: Json, objective: Json | None = None, **hyperparameters: Any
    ) -> RunSpec:
        folder = tmp_path / teacher
        if not folder.exists():
            save_tiny(folder, teacher, num_layers=4 if student["init"] == "layers" else 2)
        block = {"student": student, "objective": objective or {}, "data": {"max_new_tokens": 8}}
        files = {
            "training_path": write_rows(answered_rows[:16]),
            "teacher_dir": folder,
            "start_dir": folder,
        }
        return make_spec(block, spec=files, **{**FEW, **hyperparameters})

    return make


def student_writes(folder: Path) -> torch.Tensor:
    """What plain transformers generate from the student's folder."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    classes = {"encoder-decoder": EncoderDecoderModel, "t5": AutoModelForSeq2SeqLM}
    model: Any = classes.get(kind, AutoModelForCausalLM).from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)("Who keeps house number 3?", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    made: torch.Tensor = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return made


def assert_learns(spec: RunSpec, out: Path, series: Series, name: str) -> Outcome:
    sink = MemorySink()
    outcome = distil(spec, out, sink, EngineSampler, lambda: False)
    losses = series(sink, name)
    assert losses[-1] < losses[0]
    assert student_writes(out / outcome.folder).shape[1] > 1
    return outcome


@pytest.mark.parametrize("signal", ["conditional_mlm", "hidden"])
@pytest.mark.parametrize("student", ["t5", "bloom", "encoder-decoder"])
@pytest.mark.parametrize("teacher", ["bert", "roberta"])
def test_masked_models_teach_generation(
    make_pair: MakeSpec, tmp_path: Path, series: Series, teacher: str, student: str, signal: str
) -> None:
    spec = make_pair(teacher, fresh(student), {"teacher_signal": signal, "adaptation_steps": 2})
    outcome = assert_learns(spec, tmp_path / "out", series, TEXT_LOSS[signal])
    assert outcome.result["teacher_signal"] == signal


@pytest.mark.parametrize("student", ["t5", "bloom", "encoder-decoder"])
def test_a_causal_model_teaches_every_kind(
    make_pair: MakeSpec, tmp_path: Path, series: Series, student: str
) -> None:
    spec = make_pair("gpt2", fresh(student))
    outcome = assert_learns(spec, tmp_path / "out", series, "valid_kl")
    assert outcome.result["teacher_signal"] == "logits"


@pytest.mark.parametrize("family", ["t5", "bloom", "llama", "starcoder2", "encoder-decoder"])
def test_a_model_teaches_its_own_layers(
    make_pair: MakeSpec, tmp_path: Path, series: Series, family: str
) -> None:
    spec = make_pair(family, {"init": "layers", "num_layers": 2}, learning_rate=2e-3)
    assert_learns(spec, tmp_path / "out", series, "valid_kl")


@pytest.mark.parametrize("teacher", ["bert", "gpt2"])
def test_feature_terms_come_on_top_of_distributions_and_fall(
    make_pair: MakeSpec, run: Run, series: Series, teacher: str
) -> None:
    terms = {"hidden": {"kind": "cosine"}, "attention": {"weight": 0.5}}
    sink = run(
        make_pair(
            teacher, fresh("t5"), {**terms, "adaptation_steps": "auto" if teacher == "bert" else 0}
        )
    )
    for name in ("train_hidden", "train_attention", "train_kl"):
        values = series(sink, name)
        assert len(values) == 8
        assert values[-1] < values[0]


def test_hidden_states_alone_still_teach_the_text(
    make_pair: MakeSpec, run: Run, series: Series
) -> None:
    sink = run(make_pair("bert", fresh("t5"), {"teacher_signal": "hidden"}))
    assert series(sink, "train_hidden")[-1] < series(sink, "train_hidden")[0]
    assert series(sink, "train_kl") == []  # no distribution is learned from
    assert series(sink, "train_loss")[-1] < series(sink, "train_loss")[0]


@pytest.mark.parametrize("teacher", ["bert", "gpt2"])
def test_a_run_with_projections_resumes_with_the_same_bits(
    make_pair: MakeSpec, run: Run, tmp_path: Path, teacher: str
) -> None:
    terms = {"hidden": {"weight": 2.0}, "attention": {}}
    halves = {"max_steps": 6, "eval_steps": 3, "checkpoint_steps": 3}
    spec = make_pair(teacher, fresh("t5"), terms, **halves)
    run(spec, out="whole")
    sink = MemorySink()

    def is_half_done() -> bool:
        return any((tmp_path / "first").glob("step-3"))

    with pytest.raises(Stopped):
        run(spec, out="first", sink=sink, should_stop=is_half_done)
    run(spec.model_copy(update={"resume_dir": tmp_path / "first" / "step-3"}), out="second")
    for file in ("model/model.safetensors", "optimizer.safetensors", "projections.safetensors"):
        one, other = (load_file(tmp_path / out / "step-6" / file) for out in ("whole", "second"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    moments = load_file(tmp_path / "whole" / "step-6" / "optimizer.safetensors")
    assert "projections.0.weight.exp_avg" in moments
    student = load_file(tmp_path / "whole" / "student" / "model.safetensors")
    assert not any("projection" in name for name in student)
    assert load_state(tmp_path / "second" / "step-6").step == 6


def test_projections_learn_with_the_student(make_pair: MakeSpec, run: Run, tmp_path: Path) -> None:
    spec = make_pair(
        "gpt2", fresh("bloom"), {"hidden": {}}, max_steps=4, eval_steps=2, checkpoint_steps=2
    )
    run(spec)
    early, late = (
        load_file(tmp_path / "out" / name / "projections.safetensors")
        for name in ("step-2", "step-4")
    )
    assert all(not torch.equal(early[name], late[name]) for name in early)


def test_a_masked_teacher_is_adapted_once_and_its_rows_are_the_adapted_ones(
    make_pair: MakeSpec, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.protocol.run_lines.PROGRESS_SECONDS", 0.0)
    spec = make_pair("bert", fresh("t5"), {"adaptation_steps": 3}, max_steps=2, n_epochs=1)
    first, second = run(spec), run(spec, out="second")
    stages = [
        [line.name for line in sink.lines if isinstance(line, StageLine)]
        for sink in (first, second)
    ]
    assert stages[0][:3] == ["loading_models", "adapting_teacher", "training"]
    assert "adapting_teacher" not in stages[1]
    percents = [line.percent for line in first.lines if isinstance(line, ProgressLine)]
    assert percents == sorted(percents)
    plain = make_pair("bert", fresh("t5"), {"adaptation_steps": 0}, max_steps=2, n_epochs=1)
    run(plain, out="plain")
    assert len(list((spec.cache_dir / "teacher").iterdir())) == 2
    assert len(list((spec.cache_dir / "adapted").iterdir())) == 1


def test_a_run_stopped_while_its_teacher_is_adapted_has_done_no_step(
    make_pair: MakeSpec, run: Run
) -> None:
    sink = MemorySink()

    def is_adapting() -> bool:
        return any(
            isinstance(line, StageLine) and line.name == "adapting_teacher" for line in sink.lines
        )

    with pytest.raises(Stopped) as stopped:
        run(
            make_pair("bert", fresh("t5"), {"adaptation_steps": 50}),
            sink=sink,
            should_stop=is_adapting,
        )
    assert stopped.value.step == 0


def test_a_teacher_that_is_not_masked_is_not_adapted(make_pair: MakeSpec, run: Run) -> None:
    with pytest.raises(UnsupportedModel, match="needs a masked teacher"):
        run(make_pair("gpt2", fresh("bloom"), {"adaptation_steps": 3}))


@pytest.mark.parametrize(
    ("teacher", "student", "objective", "error", "message"),
    [
        ("gpt2", fresh("t5"), {"hidden": {"side": "encoder"}}, UnsupportedModel, 'side = "decoder"'),
        ("t5", {"init": "layers", "num_layers": 2}, {"hidden": {"side": "encoder"}}, InvalidStudent, "freeze_encoder"),
        ("gpt2", fresh("bloom"), {"hidden": {"layer_map": [[0, 9]]}}, InvalidStudent, "no layer 9"),
        ("gpt2", fresh("bloom"), {"attention": {"num_relation_heads": 5}}, UnsupportedModel, "divisor of 32"),
    ],
)  # fmt: skip
def test_features_that_a_pair_cannot_compare_are_refused(
    make_pair: MakeSpec,
    run: Run,
    teacher: str,
    student: Json,
    objective: Json,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(make_pair(teacher, student, objective))


def test_states_of_different_tokenizers_are_not_compared(
    make_pair: MakeSpec, run: Run, tiny_gpt2_dir: Path
) -> None:
    spec = make_pair("gpt2", {"init": "checkpoint"}, {"hidden": {}})
    other = save_tiny(spec.cache_dir.parent / "other", "gpt2", num_layers=1, kind="roberta")
    with pytest.raises(TokenizerMismatch, match="tokenizers"):
        run(spec.model_copy(update={"start_dir": other}))


def test_the_signal_is_said_with_its_reason(make_pair: MakeSpec, run: Run) -> None:
    sink = run(make_pair("bert", fresh("bloom"), {"adaptation_steps": 0}, max_steps=1))
    assert any(
        "conditional_mlm" in line.message for line in sink.lines if isinstance(line, MessageLine)
    )
