"""Whole runs of pairs that do not share a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.tiny import save_tiny
from tests.worker.memory_sink import MemorySink
from worker.distill.data.rows import Encoder, read_rows, split_rows
from worker.distill.pipeline import Outcome, distil
from worker.distill.students.recipe import load_model
from worker.distill.training.trainer import Stopped
from worker.errors import TokenizerMismatch
from worker.protocol.run_lines import MessageLine, MetricsLine
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

MakeSpec = Callable[..., RunSpec]
Series = Callable[[MemorySink, str], list[float]]
WriteRows = Callable[..., Path]
STUDENT = {"student": {"init": "checkpoint"}}


@pytest.fixture(scope="module")
def unigram_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with SentencePiece's kind of tokens."""
    return save_tiny(tmp_path_factory.mktemp("teacher") / "gpt2", "gpt2", kind="unigram")


@pytest.fixture
def ranks(make_spec: MakeSpec, unigram_gpt2_dir: Path) -> Callable[..., RunSpec]:
    """A function that makes a spec of that teacher and a Llama-like student with byte-level tokens."""

    def make(block: dict[str, Any] | None = None, **numbers: Any) -> RunSpec:
        return make_spec(
            {**STUDENT, **(block or {})}, spec={"teacher_dir": unigram_gpt2_dir}, **numbers
        )

    return make


@pytest.fixture
def outcome_of(tmp_path: Path) -> Callable[..., tuple[Outcome, MemorySink]]:
    def run(spec: RunSpec, out: str = "out") -> tuple[Outcome, MemorySink]:
        sink = MemorySink()
        return distil(spec, tmp_path / out, sink, EngineSampler, lambda: False), sink

    return run


OutcomeOf = Callable[..., tuple[Outcome, MemorySink]]


def messages(sink: MemorySink) -> list[str]:
    return [line.message for line in sink.lines if isinstance(line, MessageLine)]


def test_a_pair_of_one_kind_learns_by_ranks_and_from_the_text(
    ranks: Callable[..., RunSpec], outcome_of: OutcomeOf, series: Series
) -> None:
    outcome, sink = outcome_of(ranks(n_epochs=4))
    losses = series(sink, "train_loss")
    assert losses[-1] < 0.8 * losses[0]
    perplexity = series(sink, "valid_perplexity")
    assert perplexity[-1] < 0.5 * perplexity[0]
    result = outcome.result
    assert result["teacher_signal"] == "uld"
    assert "tokenizers differ" in result["teacher_signal_reason"]
    # the held-out ones are not needed
    assert result["num_teacher_rows_computed"] == result["num_train_rows"]
    assert any(
        "of the student's tokens begin at the same position" in message
        for message in messages(sink)
    )
    assert any("ce_weight is 0.5" in message for message in messages(sink))
    assert "kl" not in result["student"]
    assert result["student"]["perplexity"] < result["untrained"]["perplexity"]


def test_the_first_step_has_the_loss_of_full_logits_at_tokens_that_begin_together(
    ranks: Callable[..., RunSpec], outcome_of: OutcomeOf, series: Series
) -> None:
    spec = ranks(
        {"objective": {"ce_weight": 0.25, "temperature": 2.0}}, max_steps=1, batch_tokens=100_000
    )
    _, sink = outcome_of(spec)
    assert not any("ce_weight" in message for message in messages(sink))
    teacher, student = (
        load_model(folder).requires_grad_(False) for folder in (spec.teacher_dir, spec.start_dir)
    )
    reads = [AutoTokenizer.from_pretrained(folder) for folder in (spec.start_dir, spec.teacher_dir)]
    encoders = [Encoder(tokenizer, max_tokens=256) for tokenizer in reads]
    text = ranking = 0.0
    num_targets = num_aligned = 0
    for row in split_rows(read_rows(spec.training_path))[0]:
        mine, theirs = (encoder.encode(row) for encoder in encoders)
        z_TV = student(torch.tensor([mine.token_ids[:-1]])).logits[0]
        teachers_TU = teacher(torch.tensor([theirs.token_ids[:-1]])).logits[0]
        text -= float(
            sum(z_TV[p - 1].log_softmax(-1)[mine.token_ids[p]] for p in mine.target_positions)
        )
        num_targets += mine.num_targets
        # a token begins where as much of the answer is left as where the other begins
        left, right = (
            {
                len(read.decode(view.token_ids[p : view.spans[0][1]]).replace(" ", "")): p
                for p in reversed(view.target_positions)
            }
            for read, view in zip(reads, (mine, theirs), strict=True)
        )
        ends = [len(read.eos_token) for read in reads]
        for size, p in left.items():
            other = right.get(size - ends[0] + ends[1])
            if other is not None:
                q, t = (z / 2.0 for z in (z_TV[p - 1], teachers_TU[other - 1]))
                q, t = (z.softmax(-1).sort(descending=True).values for z in (q, t))
                ranking += float((q - torch.nn.functional.pad(t, (0, len(q) - len(t)))).abs().sum())
                num_aligned += 1
    expected = (0.25 * text + 0.75 * 4 * ranking) / num_targets
    assert 0 < num_aligned < num_targets
    assert series(sink, "train_loss") == [pytest.approx(expected, rel=1e-4)]


def test_a_pair_that_compares_ranks_resumes_to_the_same_bits(
    ranks: Callable[..., RunSpec], outcome_of: OutcomeOf, tmp_path: Path
) -> None:
    spec = ranks(n_epochs=20, max_steps=8, eval_steps=4, checkpoint_steps=4)
    outcome_of(spec, "whole")
    sink = MemorySink()

    def is_half_done() -> bool:
        return any(isinstance(line, MetricsLine) and line.step >= 4 for line in sink.lines)

    with pytest.raises(Stopped):
        distil(spec, tmp_path / "first", sink, EngineSampler, is_half_done)
    _, again = outcome_of(
        spec.model_copy(update={"resume_dir": tmp_path / "first" / "step-4"}), "second"
    )
    assert not any("not bit-identical" in message for message in messages(again))
    one, other = (
        load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "second")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_encoder_decoders_compare_ranks_too(
    make_spec: MakeSpec,
    outcome_of: OutcomeOf,
    series: Series,
    tiny_t5_dir: Path,
    tiny_bart_dir: Path,
) -> None:
    spec = make_spec(STUDENT, spec={"teacher_dir": tiny_bart_dir, "start_dir": tiny_t5_dir})
    outcome, sink = outcome_of(spec)
    assert outcome.result["teacher_signal"] == "uld"
    losses = series(sink, "train_loss")
    assert losses[-1] < losses[0]


def test_what_a_teacher_of_another_kind_writes_is_learnt(
    make_spec: MakeSpec, write_rows: WriteRows, outcome_of: OutcomeOf, series: Series,
    unigram_gpt2_dir: Path, tiny_llama_dir: Path, tiny_t5_dir: Path,
) -> None:  # fmt: skip
    rows = write_rows([{"prompt": f"Who keeps house number {i}?"} for i in range(40)])
    folders = {"teacher_dir": tiny_llama_dir, "start_dir": tiny_t5_dir, "training_path": rows}
    spec = make_spec({**STUDENT, "data": {"max_new_tokens": 12}}, spec=folders, n_epochs=3)
    outcome, sink = outcome_of(spec)
    assert outcome.result["teacher_signal"] == "text"
    assert "model families differ" in outcome.result["teacher_signal_reason"]
    perplexity = series(sink, "valid_perplexity")
    assert perplexity[-1] < 0.5 * perplexity[0]
    assert load_model(spec.cache_dir.parent / "out" / outcome.folder).config.model_type == "t5"
    assert len(list((spec.cache_dir / "answers").glob("*.jsonl"))) == 1


def test_pairs_whose_text_has_nothing_in_common_are_told_what_works(
    ranks: Callable[..., RunSpec], outcome_of: OutcomeOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.distill.losses.uld.align", lambda *_: ([], []))
    with pytest.raises(TokenizerMismatch, match='"text"'):
        outcome_of(ranks())


def test_answers_that_are_too_long_for_the_student_are_cut(
    make_spec: MakeSpec, write_rows: WriteRows, outcome_of: OutcomeOf, unigram_gpt2_dir: Path
) -> None:
    rows = write_rows([{"prompt": f"Who keeps house {i}?"} for i in range(40)])
    folders = {"teacher_dir": unigram_gpt2_dir, "training_path": rows}
    block = {**STUDENT, "data": {"max_new_tokens": 24}}
    outcome, _ = outcome_of(make_spec(block, spec=folders, n_epochs=1, max_sequence_tokens=50))
    assert outcome.result["num_train_rows"] == 36
