import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from worker.cpu import HAS_FAST_BFLOAT16
from worker.distill.data.answer_cache import AnswerFile
from worker.distill.data.rows import Encoder, Row, read_rows
from worker.distill.data.sampler import Generation, Sampler
from worker.distill.evaluation.held_out import HeldOut
from worker.distill.evaluation.report import Evaluator, JudgedTeacher, View
from worker.distill.students.recipe import load_model, plan_student
from worker.models.architectures import kind_of
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

Json = dict[str, Any]  # Any: open-ended JSON
LONG = [
    {"prompt": f"Who keeps house {i}?", "completion": f"The student keeps house {i}."}
    for i in range(6)
]
MOODS = [{"prompt": f"Is jar {i} full?", "completion": ("yes", "No.")[i % 2]} for i in range(60)]


class Counting:
    """A sampler that remembers how it was asked."""

    def __init__(self, sampler: Sampler, asked: list[tuple[int, int]]) -> None:
        self.sampler = sampler
        self.asked = asked

    def generate(
        self, prompts: Sequence[Sequence[int]], **how: Any
    ) -> list[Generation]:  # Any: passed on
        self.asked.append((len(prompts), how["max_new_tokens"]))
        return self.sampler.generate(prompts, **how)


class Bench:
    """A judge of a tiny model's students over some rows; held-out sums come from full logits, one row at a time."""

    def __init__(self, spec: RunSpec, rows: list[Row], folder: Path) -> None:
        self.spec = spec
        self.asked: list[tuple[int, int]] = []
        self.warnings: list[str] = []
        self.shares: list[float] = []
        self.num_measured = 0
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.teacher = load_model(folder).requires_grad_(False)
        shape = kind_of(self.teacher.config)
        start_id = self.teacher.config.decoder_start_token_id if shape == "seq2seq" else None
        encoder = Encoder(tokenizer, max_tokens=200, shape=shape, start_id=start_id)
        self.examples = [encoder.encode(row) for row in rows]
        view = View(self.examples, tokenizer, self.measure)
        self.evaluator = Evaluator(
            spec=spec,
            student_view=view,
            teacher=JudgedTeacher(view, lambda: load_model(spec.teacher_dir)),
            valid_rows=rows,
            device="cpu",
            sampler_for=lambda model: Counting(EngineSampler(model), self.asked),
            on_progress=self.shares.append,
            warn=self.warnings.append,
        )
        self.recipe = plan_student(folder, folder, spec.distillation.student)

    def measure(self, model: PreTrainedModel) -> HeldOut:
        self.num_measured += 1
        sums = []
        for example in self.examples:
            ids_1T, at = torch.tensor([example.token_ids]), torch.tensor(example.target_positions)
            read = {"input_ids": ids_1T}
            if example.source_ids:
                read = {
                    "input_ids": torch.tensor([example.source_ids]),
                    "decoder_input_ids": ids_1T,
                }
            p, q = (m(**read).logits[0, at - 1].log_softmax(-1) for m in (self.teacher, model))
            kl = (p.exp() * (p - q)).sum().clamp(min=0.0)
            ce = -q.gather(1, ids_1T[0, at][:, None]).sum()
            sums.append([kl, kl, ce, (p.argmax(-1) == q.argmax(-1)).sum()])
        targets_R = torch.tensor([example.num_targets for example in self.examples])
        return HeldOut(torch.tensor(sums, dtype=torch.float64), targets_R)

    def report(self, best_dir: Path, **more: Any) -> Json:
        report = self.evaluator.report(self.recipe, best_dir, AnswerFile(None), **more)
        return dict(json.loads(json.dumps(report)))  # as a client gets it


@pytest.fixture
def make_bench(
    make_spec: Callable[..., RunSpec], write_rows: Callable[..., Path], student_dir: Path
) -> Callable[..., Bench]:
    """A function that makes a bench for rows; keywords go to the evaluation block."""

    def make(rows: list[Json], **evaluation: Any) -> Bench:
        path = write_rows(rows)
        block = {"evaluation": {"num_samples": 2, **evaluation}, "data": {"max_new_tokens": 12}}
        folders = {"teacher_dir": student_dir, "start_dir": student_dir}
        return Bench(
            make_spec(block, spec={"training_path": path, **folders}), read_rows(path), student_dir
        )

    return make


MakeBench = Callable[..., Bench]


@pytest.fixture
def student_dir(request: pytest.FixtureRequest) -> Path:
    """A student as good as its teacher, since it is the teacher; of the family that the test names."""
    folder: Path = request.getfixturevalue(f"tiny_{getattr(request, 'param', 'llama')}_dir")
    return folder


def test_every_figure_has_an_interval_around_it(make_bench: MakeBench, student_dir: Path) -> None:
    report = make_bench(LONG).report(student_dir)
    quality = {"loss", "kl", "perplexity", "agreement", "rouge_l", "rouge_l_reference"}
    quality |= {"exact_match", "exact_match_reference", "answer_tokens"}
    for model in ("teacher", "untrained", "student"):
        entry = report[model]
        assert set(entry["intervals"]) == quality
        for name, (low, high) in entry["intervals"].items():
            assert low - 1e-9 <= entry[name] <= high + 1e-9, (model, name)
        assert entry["tokens_per_second"] > 0
    low, high = report["untrained"]["intervals"]["kl"]
    assert low < high


def test_rows_that_ask_the_same_make_no_figure_more_certain(
    make_bench: MakeBench, student_dir: Path
) -> None:
    once = make_bench(LONG, metrics=["agreement", "rouge_l"]).report(student_dir)["untrained"]
    twice = make_bench([*LONG, *LONG], metrics=["agreement", "rouge_l"]).report(student_dir)
    assert twice["num_judged_questions"] == 6
    for name, interval in once["intervals"].items():
        assert twice["untrained"]["intervals"][name] == pytest.approx(interval), name


def test_intervals_of_a_single_question_come_with_a_warning(
    make_bench: MakeBench, student_dir: Path
) -> None:
    bench = make_bench(
        [{"prompt": "Who?", "completion": f"Number {i}."} for i in range(3)], metrics=[]
    )
    bench.report(student_dir)
    assert [
        "all evaluated rows have the same question" in warning for warning in bench.warnings
    ] == [True]


def test_answers_are_compared_with_the_teachers_and_with_the_references(
    make_bench: MakeBench, student_dir: Path
) -> None:
    report = make_bench(LONG, metrics=["rouge_l", "exact_match"]).report(student_dir)
    for model in ("teacher", "student"):
        assert (report[model]["rouge_l"], report[model]["exact_match"]) == (1.0, 1.0)
        assert report[model]["rouge_l_reference"] < 0.5
        assert report[model]["exact_match_reference"] == 0.0
    assert report["untrained"]["rouge_l"] < 1.0
    sample = report["samples"][1]
    assert list(sample) == ["prompt", "reference", "teacher", "untrained", "student"]
    assert (sample["prompt"], sample["reference"]) == (
        "Who keeps house 1?",
        "The student keeps house 1.",
    )
    assert sample["student"] == sample["teacher"]


def test_rows_without_answers_have_no_references(make_bench: MakeBench, student_dir: Path) -> None:
    rows = [{"prompt": "Who?", "completion": "I."}, *({"prompt": f"{i}?"} for i in range(3))]
    bench = make_bench(rows, metrics=["rouge_l"])
    bench.examples[1:] = [example.answered((5, 2)) for example in bench.examples[1:]]
    report = bench.report(student_dir)
    assert ["reference" in sample for sample in report["samples"]] == [True, False]
    assert "rouge_l_reference" in report["student"]


def test_the_student_is_set_against_the_untrained_one_and_the_baseline(
    make_bench: MakeBench, student_dir: Path
) -> None:
    bench = make_bench(LONG, metrics=["agreement"], num_samples=0)
    report = bench.report(student_dir, baseline_dir=student_dir)
    assert list(report["differences"]) == ["untrained", "ce_baseline"]
    gain = report["differences"]["untrained"]
    assert gain["kl"] == pytest.approx(report["student"]["kl"] - report["untrained"]["kl"])
    assert gain["intervals"]["kl"][0] < gain["kl"] < gain["intervals"]["kl"][1] < 0
    equal = report["differences"]["ce_baseline"]
    assert equal["intervals"]["agreement"] == [0.0, 0.0]
    assert report["ce_baseline"]["agreement"] == 1.0
    assert bench.asked == []  # no metric wants answers


@pytest.mark.skipif(not HAS_FAST_BFLOAT16, reason="the CPU has no bfloat16 instructions")
def test_losses_are_measured_as_in_training_and_answers_generated_as_in_serving(
    make_bench: MakeBench, student_dir: Path
) -> None:
    plain = make_bench(LONG).report(student_dir)
    bench = make_bench(LONG)
    seen: list[tuple[str, set[torch.dtype]]] = []

    def note(what: str, model: PreTrainedModel) -> None:
        packed = {m.packed.dtype for m in model.model.modules() if hasattr(m, "packed")}
        seen.append((what, packed))
        assert model.get_output_embeddings().packed.dtype == torch.float32

    measure, sampler_for = bench.measure, bench.evaluator.sampler_for

    def noted_measure(model: PreTrainedModel) -> HeldOut:
        note("losses", model)
        return measure(model)

    def noted_sampler(model: PreTrainedModel) -> Sampler:
        note("answers", model)
        return sampler_for(model)

    view = replace(bench.evaluator.student_view, measure=noted_measure)
    bench.evaluator.student_view, bench.evaluator.sampler_for = view, noted_sampler
    bench.evaluator.decoding_dtype = torch.bfloat16
    report = bench.report(student_dir)
    assert {what for what, _ in seen} == {"losses", "answers"}
    for what, dtypes in seen:
        assert dtypes == {torch.float32 if what == "losses" else torch.bfloat16}
    for name in ("teacher", "student"):
        assert report[name]["kl"] == plain[name]["kl"]
        assert report[name]["loss"] == plain[name]["loss"]


def test_progress_rises_to_the_whole(make_bench: MakeBench, student_dir: Path) -> None:
    bench = make_bench(LONG, metrics=["rouge_l"])
    bench.report(student_dir, baseline_dir=student_dir)
    assert bench.shares == sorted(bench.shares)
    assert bench.shares[-1] == pytest.approx(1.0)


def test_a_ladder_judges_its_teacher_once(
    make_bench: MakeBench, student_dir: Path, tmp_path: Path
) -> None:
    bench = make_bench(LONG, metrics=["rouge_l"])
    other_dir = shutil.copytree(student_dir, tmp_path / "other")
    first, second = bench.report(other_dir), bench.report(student_dir)
    assert bench.num_measured == 5  # the teacher, and twice the untrained and the trained student
    assert first["teacher"] == second["teacher"]
    assert second["student"]["rouge_l"] == 1.0


def test_a_student_that_has_an_entry_is_not_judged_again(
    make_bench: MakeBench, student_dir: Path
) -> None:
    bench = make_bench(LONG, metrics=["rouge_l"])
    entry = bench.evaluator.entry(student_dir, AnswerFile(None))
    assert bench.num_measured == 2  # the teacher and the student
    assert bench.report(student_dir)["student"] == entry
    assert bench.num_measured == 3  # and the untrained one


def test_few_short_targets_give_accuracy_and_macro_f1(
    make_bench: MakeBench, student_dir: Path
) -> None:
    bench = make_bench(MOODS, metrics=["exact_match"])
    report = bench.report(student_dir)
    for name in ("accuracy", "macro_f1", "accuracy_teacher", "macro_f1_teacher"):
        assert report["student"][name] == 0.0  # a random model's answers are no labels
        assert report["student"]["intervals"][name] == [0.0, 0.0]
    assert {num_prompts for num_prompts, _ in bench.asked} == {60}  # more than of long answers
    assert {num_tokens for _, num_tokens in bench.asked} == {3 + 8}  # "No." is three


def test_accuracy_that_cannot_be_had_is_left_out_with_a_warning(
    make_bench: MakeBench, student_dir: Path
) -> None:
    bench = make_bench(LONG, metrics=["accuracy", "rouge_l"])
    report = bench.report(student_dir)
    assert "accuracy" not in report["student"]
    assert report["student"]["rouge_l"] == 1.0
    (warning,) = bench.warnings
    assert "few repeat" in warning


def test_what_the_gate_looks_at_is_measured(make_bench: MakeBench, student_dir: Path) -> None:
    gate = {"metric": "agreement", "at_least": 0.5}
    report = make_bench(LONG, metrics=["perplexity"], num_samples=0, gate=gate).report(student_dir)
    assert report["student"]["agreement"] == 1.0


@pytest.mark.parametrize("student_dir", ["t5", "bart", "bert2bert"], indirect=True)
def test_encoder_decoders_are_judged_by_their_answers_to_the_source(
    make_bench: MakeBench, student_dir: Path
) -> None:
    bench = make_bench(LONG, metrics=["perplexity", "rouge_l"])
    report = bench.report(student_dir)
    assert {num_prompts for num_prompts, _ in bench.asked} == {6}
    assert (report["student"]["rouge_l"], report["student"]["kl"]) == (
        1.0,
        pytest.approx(0.0, abs=1e-5),
    )
    assert report["untrained"]["kl"] > 0.01
    layers = [
        (report[name]["num_encoder_layers"], report[name]["num_layers"])
        for name in ("teacher", "untrained")
    ]
    assert layers == [(4, 4), (4, 2)]


def test_a_masked_teacher_is_not_asked(
    make_bench: MakeBench, student_dir: Path, tiny_bert_dir: Path
) -> None:
    bench = make_bench(LONG)
    zeros = HeldOut(torch.zeros(6, 4, dtype=torch.float64), torch.ones(6, dtype=torch.int64))
    assert bench.evaluator.teacher is not None
    view = replace(bench.evaluator.teacher.view, measure=lambda model: zeros)
    bench.evaluator.teacher = JudgedTeacher(view, lambda: load_model(tiny_bert_dir))
    report = bench.report(student_dir)
    assert "tokens_per_second" not in report["teacher"]
    assert "rouge_l" not in report["student"]
    assert "rouge_l_reference" in report["student"]
    assert list(report["samples"][0]) == ["prompt", "reference", "untrained", "student"]
    assert "speedup" not in report["compression"]
