"""Training on the completions of the rows alone, without a teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.worker.memory_sink import MemorySink
from worker.cpu import HAS_FAST_BFLOAT16
from worker.distill.data.dataset import Reader
from worker.distill.data.rows import Example, read_rows
from worker.distill.data.split import hold_out
from worker.distill.pipeline import Outcome, distil
from worker.distill.students.recipe import load_model
from worker.distill.training.trainer import Stopped
from worker.models.architectures import read_config
from worker.protocol.run_lines import CheckpointLine, StageLine
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

MakeSpec = Callable[..., RunSpec]
Series = Callable[[MemorySink, str], list[float]]
BLOCK = {
    "student": {"init": "checkpoint", "freeze_head": False, "freeze_encoder": False},
    "data": {"completions": "dataset", "max_new_tokens": 8},
    "objective": {"teacher_signal": "text", "ce_weight": 1.0},
    "evaluation": {"metrics": ["perplexity"], "num_samples": 2},
}


@pytest.fixture
def supervised(make_spec: MakeSpec) -> Callable[..., RunSpec]:
    def make(block: dict[str, Any] | None = None, **hyperparameters: Any) -> RunSpec:
        merged = {**BLOCK, **(block or {})}
        return make_spec(merged, spec={"has_teacher": False}, **hyperparameters)

    return make


def outcome(spec: RunSpec, out: Path, sink: MemorySink | None = None) -> Outcome:
    return distil(spec, out, sink or MemorySink(), EngineSampler, lambda: False)


def held_out(spec: RunSpec, tokenizer: Any) -> list[Example]:
    reader = Reader(read_config(spec.start_dir), tokenizer)
    encoder = reader.encoder(max_tokens=256, is_last_only=False)
    return [encoder.encode(row) for row in hold_out(read_rows(spec.training_path)).valid]


@torch.no_grad()
def measured(folder: Path, examples: list[Example]) -> tuple[float, float]:
    """The mean loss and the token accuracy, from full logits, one row at a time."""
    model = load_model(folder)
    losses, hits = [], []
    for example in examples:
        ids, at = torch.tensor([example.token_ids]), torch.tensor(example.target_positions)
        logits = model(input_ids=ids).logits[0, at - 1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, at], reduction="none"))
        hits.append((logits.argmax(-1) == ids[0, at]).float())
    return float(torch.cat(losses).mean()), float(torch.cat(hits).mean())


def test_the_result_compares_the_model_before_and_after(
    supervised: Callable[..., RunSpec], tmp_path: Path, tokenizer: Any, series: Series
) -> None:
    spec, sink = supervised(n_epochs=4), MemorySink()
    done = outcome(spec, tmp_path / "out", sink)
    before, after = done.result["before"], done.result["after"]
    examples = held_out(spec, tokenizer)
    for entry, folder in ((before, spec.start_dir), (after, tmp_path / "out" / done.folder)):
        loss, accuracy = measured(folder, examples)
        assert entry["loss"] == pytest.approx(loss, rel=1e-4)
        assert entry["token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert entry["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-3)
    assert after["loss"] < before["loss"]
    assert after["token_accuracy"] > before["token_accuracy"]
    assert done.result["differences"]["before"]["loss"] < 0
    assert set(done.result["samples"][0]) == {"prompt", "reference", "before", "after"}
    named = {"teacher", "compression", "teacher_signal", "student", "untrained"}
    assert not named & done.result.keys()
    assert series(sink, "train_mean_token_accuracy")[-1] > 0
    accuracies = series(sink, "valid_mean_token_accuracy")
    assert any(value == pytest.approx(after["token_accuracy"]) for value in accuracies)
    stages = [line.name for line in sink.lines if isinstance(line, StageLine)]
    assert stages == ["loading_models", "training", "evaluating", "exporting"]
    assert not spec.cache_dir.exists()  # nothing of a teacher is cached


def test_the_final_evaluation_rounds_as_the_training_does(
    supervised: Callable[..., RunSpec], tmp_path: Path, tokenizer: Any
) -> None:
    spec = supervised(n_epochs=2, precision="bfloat16")
    done = outcome(spec, tmp_path / "out")
    loss, _ = measured(tmp_path / "out" / done.folder, held_out(spec, tokenizer))
    rounded = done.result["after"]["loss"]
    assert rounded == pytest.approx(loss, rel=0.02)  # bfloat16 has 8 bits of precision
    if HAS_FAST_BFLOAT16:
        assert rounded != pytest.approx(loss, rel=1e-6)


def test_all_parameters_are_trained_and_the_architecture_stays(
    supervised: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = supervised(n_epochs=1)
    done = outcome(spec, tmp_path / "out")
    one, other = (
        load_file(folder / "model.safetensors")
        for folder in (spec.start_dir, tmp_path / "out" / done.folder)
    )
    assert one.keys() == other.keys()
    assert all(not torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_ends_like_an_uninterrupted_one(
    supervised: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = supervised(n_epochs=2, eval_steps=3, checkpoint_steps=3)
    uninterrupted = outcome(spec, tmp_path / "whole")
    sink = MemorySink()

    def is_asked_to_stop() -> bool:
        return any(isinstance(line, CheckpointLine) and line.step >= 3 for line in sink.lines)

    with pytest.raises(Stopped):
        distil(spec, tmp_path / "cut", sink, EngineSampler, is_asked_to_stop)
    resumed = spec.model_copy(update={"resume_dir": max((tmp_path / "cut").glob("step-*"))})
    again = outcome(resumed, tmp_path / "again")
    for name in ("loss", "token_accuracy"):
        assert again.result["after"][name] == uninterrupted.result["after"][name]
    weights = [load_file(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "again")]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_batch_of_rows_is_computed_in_micro_batches(
    supervised: Callable[..., RunSpec], tmp_path: Path, series: Series
) -> None:
    sinks = [MemorySink(), MemorySink()]
    for sink, tokens in zip(sinks, (10_000, 64), strict=True):
        outcome(
            supervised(n_epochs=1, batch_rows=8, batch_tokens=tokens), tmp_path / str(tokens), sink
        )
    unsplit, cut = (series(sink, "train_loss") for sink in sinks)
    assert len(unsplit) == len(cut) == 5  # 36 rows, 8 at a time
    assert unsplit == pytest.approx(cut, rel=1e-4)


def test_the_multiplier_scales_the_automatic_learning_rate(
    supervised: Callable[..., RunSpec], tmp_path: Path, series: Series
) -> None:
    sinks = [MemorySink(), MemorySink()]
    for sink, multiplier in zip(sinks, (None, 0.5), strict=True):
        spec = supervised(
            n_epochs=1, learning_rate="auto", learning_rate_multiplier=multiplier, max_steps=3
        )
        outcome(spec, tmp_path / str(multiplier), sink)
    plain, halved = (series(sink, "learning_rate") for sink in sinks)
    assert halved == pytest.approx([rate / 2 for rate in plain])


def test_adapters_are_merged_into_the_model(
    supervised: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = supervised({"student": {"init": "lora", "lora": {"rank": 4}}}, n_epochs=2)
    done = outcome(spec, tmp_path / "out")
    assert done.result["after"]["loss"] < done.result["before"]["loss"]
    names = load_file(tmp_path / "out" / done.folder / "model.safetensors").keys()
    assert names == load_file(spec.start_dir / "model.safetensors").keys()


def test_an_encoder_decoder_is_trained_with_its_encoder(
    make_spec: MakeSpec, tmp_path: Path, tiny_t5_dir: Path
) -> None:
    folders = {"teacher_dir": tiny_t5_dir, "start_dir": tiny_t5_dir, "has_teacher": False}
    done = outcome(make_spec(BLOCK, spec=folders, n_epochs=2), tmp_path / "out")
    assert done.result["after"]["loss"] < done.result["before"]["loss"]
    one, other = (
        load_file(folder / "model.safetensors")
        for folder in (tiny_t5_dir, tmp_path / "out" / done.folder)
    )
    assert all(not torch.equal(one[name], other[name]) for name in one if ".layer." in name)
