import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.contracts.batch_plan import BatchPlan
from app.contracts.distillation import Data, Distillation
from tests.tiny import save_tiny
from tests.worker.memory_sink import MemorySink
from worker.cpu.linear_ops import use_onednn
from worker.distill.data.rows import Encoder, Example, Row
from worker.distill.data.sampler import Generation
from worker.distill.evaluation.held_out import HeldOut
from worker.distill.pipeline import Outcome, distil
from worker.distill.students.recipe import load_model
from worker.distill.teachers.signals import Signal
from worker.distill.training.checkpoint import TrainState, load_state
from worker.distill.training.rollouts import MicroBatch, RolloutPlan, Rollouts, check_rollouts
from worker.distill.training.trainer import Stopped
from worker.errors import InvalidTrainingFile, UnsupportedModel
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

Json = dict[str, Any]  # Any: open-ended JSON
MakeSpec = Callable[..., RunSpec]
Run = Callable[..., MemorySink]
Series = Callable[[MemorySink, str], list[float]]
NUMBERS = {
    "n_epochs": 20,
    "max_steps": 8,
    "batch_tokens": 512,
    "eval_steps": 4,
    "checkpoint_steps": 4,
}
FEW = {**NUMBERS, "max_steps": 3, "eval_steps": 3}
# a loss that stands still raises phi by every step
EVAL_EACH = {
    **NUMBERS,
    "eval_steps": 1,
    "learning_rate": 1e-7,
}


def data(**fields: Any) -> Json:  # Any: open-ended JSON
    return {"completions": "student", "max_new_tokens": 8, "temperature": 1.0, **fields}


def last_step(folder: Path) -> dict[str, torch.Tensor]:
    newest = max(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    return load_file(newest / "model" / "model.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Interrupting:
    """The engine's sampler, which asks the run to stop while it answers for the `nth` time."""

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.is_asked = False

    def __call__(self, model: PreTrainedModel) -> EngineSampler:
        self.nth -= 1
        self.is_asked = self.nth == 0
        return EngineSampler(model)


def resumes(spec: RunSpec, run: Run, tmp_path: Path, nth: int) -> MemorySink:
    """Compares a run that is stopped amid its nth rollouts, and goes on without a cache, with one that is not."""
    sink = run(spec, out="whole")
    interrupting = Interrupting(nth)
    with pytest.raises(Stopped) as stopped:
        distil(spec, tmp_path / "first", MemorySink(), interrupting, lambda: interrupting.is_asked)
    step = stopped.value.step
    assert 0 < step < 8
    shutil.rmtree(spec.cache_dir)
    run(spec.model_copy(update={"resume_dir": tmp_path / "first" / f"step-{step}"}), out="second")
    assert_same_bits(last_step(tmp_path / "whole"), last_step(tmp_path / "second"))
    one, other = (load_state(tmp_path / name / "step-8") for name in ("whole", "second"))
    assert one.model_copy(update={"trained_seconds": 0.0}) == other.model_copy(
        update={"trained_seconds": 0.0}
    )
    return sink


def test_a_run_stopped_while_the_student_answers_resumes_to_the_same_bits(
    run: Run, make_spec: MakeSpec, series: Series, tmp_path: Path
) -> None:
    sink = resumes(make_spec({"data": data()}, **NUMBERS), run, tmp_path, nth=3)
    assert 0 < sum(series(sink, "on_policy_share")) < 8


def test_a_run_with_replay_resumes_to_the_same_bits_and_buffer(
    run: Run, make_spec: MakeSpec, series: Series, tmp_path: Path
) -> None:
    block = {"data": data(completions="replay", replay_capacity=6)}
    sink = resumes(make_spec(block, {"seed": 1}, **EVAL_EACH), run, tmp_path, nth=2)
    buffers = [
        (tmp_path / name / "step-8" / "replay.jsonl").read_bytes() for name in ("whole", "second")
    ]
    assert buffers[0] == buffers[1]
    assert buffers[0].count(b"\n") == 6
    share, fresh = series(sink, "on_policy_share"), series(sink, "num_rollouts")
    assert any(
        on_policy and not num_fresh for on_policy, num_fresh in zip(share, fresh, strict=True)
    )
    assert series(sink, "replay_phi") == pytest.approx([min(1.0, 0.1 * step) for step in range(8)])


def test_an_encoder_decoder_with_rollouts_resumes_to_the_same_bits(
    run: Run, make_spec: MakeSpec, series: Series, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "t5", "t5")
    spec = make_spec(
        {"data": data(student_share=1.0)}, {"teacher_dir": folder, "start_dir": folder}, **NUMBERS
    )
    sink = resumes(spec, run, tmp_path, nth=4)
    assert series(sink, "on_policy_share") == [1.0] * 8
    assert all(1 <= mean <= 8 for mean in series(sink, "rollout_tokens"))


def test_a_causal_teacher_judges_the_answers_of_an_encoder_decoder(
    run: Run, make_spec: MakeSpec, series: Series, tmp_path: Path
) -> None:
    teacher = save_tiny(tmp_path / "llama", "llama", kind="unigram")
    student = save_tiny(tmp_path / "t5", "t5")
    block = {"data": data(student_share=1.0), "student": {"init": "checkpoint"}}
    sink = run(make_spec(block, {"teacher_dir": teacher, "start_dir": student}, **FEW))
    assert series(sink, "on_policy_share") == [1.0] * 3
    assert series(sink, "train_kl")[-1] < series(sink, "train_kl")[0]


def test_a_share_of_nothing_is_the_plain_run_bit_for_bit(
    run: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    run(make_spec(**FEW), out="plain")
    run(make_spec({"data": data(student_share=0.0)}, **FEW), out="none")
    assert_same_bits(last_step(tmp_path / "plain"), last_step(tmp_path / "none"))


def test_with_a_share_of_all_the_completions_of_the_data_teach_nothing(
    run: Run,
    make_spec: MakeSpec,
    answered_rows: list[Json],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    others = [
        {**row, "completion": row["completion"].replace("student keeps", "keeps student")}
        for row in answered_rows
    ]
    paths = write_rows(answered_rows, "some.jsonl"), write_rows(others, "others.jsonl")
    for share in (1.0, 0.0):
        for i, path in enumerate(paths):
            spec = make_spec({"data": data(student_share=share)}, {"training_path": path}, **FEW)
            run(spec, out=f"{share}-{i}")
    assert_same_bits(last_step(tmp_path / "1.0-0"), last_step(tmp_path / "1.0-1"))
    with pytest.raises(AssertionError):
        assert_same_bits(last_step(tmp_path / "0.0-0"), last_step(tmp_path / "0.0-1"))


def test_the_teacher_is_asked_for_rollouts_and_once_for_each_row_of_the_data(
    make_spec: MakeSpec, series: Series, tmp_path: Path
) -> None:
    sink = MemorySink()
    spec = make_spec({"data": data()}, **{**NUMBERS, "max_steps": 24})
    outcome: Outcome = distil(spec, tmp_path / "out", sink, EngineSampler, lambda: False)
    num_rows = outcome.result["num_train_rows"] + outcome.result["num_validation_rows"]
    num_rollouts = sum(series(sink, "num_rollouts"))
    assert num_rollouts > 0
    assert outcome.result["num_teacher_rows_computed"] == num_rows + num_rollouts


def test_expected_rows_of_the_data_and_hidden_rows_of_rollouts_train_alike(
    run: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    # keeps hidden states for the data too
    never = {"then": {"divergence": "skew_forward_kl", "at": 0.999}}
    run(make_spec({"data": data(student_share=0.7)}, **FEW), out="mixed")
    run(make_spec({"data": data(student_share=0.7), "objective": never}, **FEW), out="hidden")
    mixed, hidden = last_step(tmp_path / "mixed"), last_step(tmp_path / "hidden")
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, hidden[name], rtol=0, atol=2e-3, msg=name)


def test_a_second_phase_alone_takes_the_students_answers(
    run: Run, make_spec: MakeSpec, series: Series, tmp_path: Path
) -> None:
    phase = {"divergence": "forward_kl", "at": 0.5}
    plain = run(make_spec({"objective": {"then": phase}}, **NUMBERS), out="plain")
    fields = data(student_share=1.0)
    del fields["completions"]
    block = {"objective": {"then": {**phase, "completions": "student"}}, "data": fields}
    sink = run(make_spec(block, **NUMBERS), out="phase")
    assert series(sink, "on_policy_share") == [0.0] * 4 + [1.0] * 4
    loss, plain_loss = series(sink, "train_loss"), series(plain, "train_loss")
    assert loss[:4] == plain_loss[:4]
    assert loss[4] != plain_loss[4]


def test_rollouts_cut_into_pieces_train_like_one_batch(
    run: Run, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(
        {"data": data(student_share=1.0, max_new_tokens=100)},
        **{**FEW, "max_steps": 1, "batch_tokens": 128},
    )
    sizes = []
    cut = Rollouts.pieces

    def spy(self: Rollouts, *arguments: Any) -> list[MicroBatch]:  # Any: passed on
        sizes.append(len(pieces := cut(self, *arguments)))
        return pieces

    monkeypatch.setattr(Rollouts, "pieces", spy)
    run(spec, out="cut")
    monkeypatch.setattr("worker.distill.training.rollouts.LONGEST_BATCH", 1000)
    run(spec, out="whole")
    assert sizes[0] > 1
    assert sizes[1:] == [1]
    one, other = last_step(tmp_path / "cut"), last_step(tmp_path / "whole")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-4, msg=name)


class Echo:
    """A sampler whose answers are the seeds it was given: no model needed."""

    def __init__(self, model: object = None) -> None:
        self.seeds: list[int] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int], **how: Any
    ) -> list[Generation]:
        return [Generation(tokens=(7, seed % 90), is_finished=False) for seed in seeds]


@pytest.fixture
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    model = load_model(tiny_llama_dir)
    use_onednn(model)
    return model


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    encoder = Encoder(tokenizer, max_tokens=64)
    turns = [
        ({"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "lamp"})
        for i in range(20)
    ]
    return [encoder.encode(Row(i, pair)) for i, pair in enumerate(turns)]


@pytest.fixture
def rollouts(model: PreTrainedModel, rows: list[Example]) -> Callable[..., Rollouts]:
    def make(
        num_tokens: int = 384, sampler: Any = Echo, resume_dir: Path | None = None, **fields: Any
    ) -> Rollouts:
        plan = RolloutPlan(Data(**data(**fields)), None, 5, rows, rows, 64, num_tokens, sampler)
        batches = BatchPlan([], batch_tokens=512, seed=0)
        return Rollouts(plan, model, 100, batches, resume_dir)

    return make


def targets(pieces: list[MicroBatch]) -> list[list[int]]:
    return [piece.batch.targets_N.tolist() for piece in pieces]


def test_a_step_is_decided_and_sampled_by_its_number_alone(
    rollouts: Callable[..., Rollouts],
) -> None:
    one, other = rollouts(), rollouts()
    numbers = [3, 1, 4]
    for_one = {step: targets(one.pieces(TrainState(step=step), numbers)) for step in range(40)}
    for_other = {
        step: targets(other.pieces(TrainState(step=step), numbers)) for step in reversed(range(40))
    }
    assert for_one == for_other
    made = [answers for answers in for_one.values() if answers]
    assert 10 < len(made) < 30
    assert len({json.dumps(answers) for answers in made}) == len(made)


def test_rollouts_are_the_plain_greedy_answers_of_the_weights_as_they_are(
    rollouts: Callable[..., Rollouts], rows: list[Example], model: PreTrainedModel
) -> None:
    source = rollouts(sampler=EngineSampler, student_share=1.0, temperature=0.0, max_new_tokens=12)
    answers = []
    for step in range(2):
        model.train(step == 1)
        (piece,) = source.pieces(TrainState(step=step), [2, 11])
        assert model.training == (step == 1)
        model.eval()
        for rollout in piece.rollouts:
            prompt = torch.tensor([rollout.prompt_ids])
            plain = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
            )
            assert rollout.completion_ids == tuple(plain[0, prompt.shape[1] :].tolist())
            answers.append(rollout.completion_ids)
        (piece.batch.targets_N.sum() + model(prompt).logits.sum()).backward()  # still to be trained
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    assert set(answers[:2]).isdisjoint(answers[2:])


def test_an_answer_that_does_not_end_gets_no_end_token(
    rollouts: Callable[..., Rollouts], rows: list[Example]
) -> None:
    (piece,) = rollouts(student_share=1.0).pieces(TrainState(), [0])
    assert len(piece.batch.targets_N) == 2
    assert piece.rollouts[0].prompt_ids == rows[0].prompt_ids


def test_a_token_that_the_tokenizer_does_not_have_ends_the_answer(
    rollouts: Callable[..., Rollouts],
) -> None:
    (piece,) = rollouts(num_tokens=8, student_share=1.0).pieces(TrainState(), [0, 1])
    assert piece.batch.targets_N.tolist() == [7, 7]
    assert rollouts(num_tokens=7, student_share=1.0).pieces(TrainState(), [0, 1]) == []


def test_the_replay_buffer_forgets_the_oldest_and_survives_a_checkpoint(
    rollouts: Callable[..., Rollouts], tmp_path: Path
) -> None:
    source = rollouts(completions="replay", replay_capacity=5)
    now = TrainState(replay_phi=1.0)
    source.pieces(now, [0, 1, 2])
    assert not source.buffer.is_full
    source.pieces(now, [3, 4, 5])
    assert source.buffer.is_full
    assert [row.student.line for row in source.buffer.rows] == [1, 2, 3, 4, 5]
    (tmp_path / "replay.jsonl").write_bytes(source.buffer.to_jsonl())
    again = rollouts(completions="replay", replay_capacity=5, resume_dir=tmp_path)
    assert again.buffer.rows == source.buffer.rows
    late = TrainState(replay_phi=1.0, step=99)
    (old,), (same,) = source.pieces(late, [7]), again.pieces(late, [7])
    assert {row.line for row in old.rollouts} == {1, 2, 3, 4, 5}
    assert old.rollouts == same.rollouts


def test_phi_rises_when_the_held_out_loss_no_longer_falls(
    rollouts: Callable[..., Rollouts],
) -> None:
    source, state, course = rollouts(completions="replay"), TrainState(), []
    for loss in (9.0, 5.0, 4.95, 5.5, 4.0, *[4.0] * 9):
        sums_R4 = torch.tensor([[0.0, 0.0, loss, 0.0]])
        state = state.model_copy(update=source.observe(state, HeldOut(sums_R4, torch.tensor([1]))))
        course.append(state.replay_phi)
    assert course[:6] == [0.0, 0.0, 0.1, 0.2, 0.2, 0.3]
    assert course[-2:] == [1.0, 1.0]
    assert rollouts().observe(state, HeldOut(sums_R4, torch.tensor([1]))) == {}


def test_fresh_answers_become_rarer_and_old_ones_take_their_place(
    rollouts: Callable[..., Rollouts],
) -> None:
    source = rollouts(completions="replay", replay_capacity=2)
    source.pieces(TrainState(replay_phi=1.0), [0, 1])
    counts = []
    for begin in (0, 50):
        source.take_metrics(TrainState())
        for step in range(begin, begin + 50):
            source.pieces(TrainState(step=step, replay_phi=1.0), [2, 3])
        counts.append(source.take_metrics(TrainState()))
    assert [values["on_policy_share"] for values in counts] == [1.0, 1.0]
    assert counts[0]["num_rollouts"] > 1.5 * counts[1]["num_rollouts"] > 0


@pytest.mark.parametrize("where", ["data", "then"])
def test_a_teacher_that_cannot_judge_answers_is_refused(where: str) -> None:
    then = {"objective": {"then": {"divergence": "forward_kl", "completions": "replay"}}}
    block = Distillation.model_validate(
        {"teacher": "t", **({"data": data()} if where == "data" else then)}
    )
    check_rollouts(block, Signal("logits", ""), has_one_tokenizer=True)
    with pytest.raises(UnsupportedModel, match=r'different tokenizers.*"dataset" or "teacher"'):
        check_rollouts(block, Signal("uld", ""), has_one_tokenizer=False)
    with pytest.raises(UnsupportedModel, match=r'conditional_mlm.*"dataset" or "teacher"'):
        check_rollouts(block, Signal("conditional_mlm", ""), has_one_tokenizer=True)


def test_plain_text_asks_nothing_that_a_student_could_answer(
    run: Run, make_spec: MakeSpec, write_rows: Callable[..., Path]
) -> None:
    path = write_rows([{"text": "The still is warm."}] * 4)
    with pytest.raises(InvalidTrainingFile, match="line 1 is plain text"):
        run(make_spec({"data": data()}, {"training_path": path}))
