import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from worker.distill.data.rows import Example
from worker.distill.evaluation.held_out import HeldOutRows, measure_speed, rouge_l, size_of
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.lm_head import head_of
from worker.distill.students.layer_dropping import keep_layers
from worker.distill.students.recipe import load_model
from worker.distill.teachers.cached_teacher import CachedTeacher, LiveTeacher, cached_teacher
from worker.train import EngineSampler

ROWS = [
    Example(tuple(range(10, 22)), ((4, 12),)),
    Example(tuple(range(60, 68)), ((2, 4), (6, 8))),
    Example((5, 9, 3), ((1, 3),)),
]


@pytest.fixture
def teacher_model(tiny_llama_dir: Path) -> PreTrainedModel:
    return load_model(tiny_llama_dir).requires_grad_(False)


@pytest.fixture
def teacher(teacher_model: PreTrainedModel, tmp_path: Path) -> CachedTeacher:
    return cached_teacher(
        lambda: LiveTeacher(teacher_model),
        head_of(teacher_model),
        folder=tmp_path,
        budget_bytes=2**20,
        identity="tiny",
        examples=ROWS,
    )


@pytest.fixture
def held_out() -> HeldOutRows:
    return HeldOutRows(ROWS, first_index=0, batch_tokens=16, device="cpu")


def test_held_out_means_are_those_of_full_logits_one_row_at_a_time(
    held_out: HeldOutRows, teacher: CachedTeacher, teacher_model: PreTrainedModel
) -> None:
    student = keep_layers(teacher_model, (0, 1, 3)).requires_grad_(False)
    found = held_out.measure(student, head_of(student), teacher, TokenObjective(ce_weight=0.25))
    sums = []
    for row in ROWS:
        ids_1T, at = torch.tensor([row.token_ids]), torch.tensor(row.target_positions)
        p, q = (
            m(input_ids=ids_1T).logits[0, at - 1].double().log_softmax(-1)
            for m in (teacher_model, student)
        )
        row_kl = float((p.exp() * (p - q)).sum())
        row_ce = -float(q.gather(1, ids_1T[0, at][:, None]).sum())
        row_agreeing = float((p.argmax(-1) == q.argmax(-1)).sum())
        sums.append([0.75 * row_kl + 0.25 * row_ce, row_kl, row_ce, row_agreeing])
    torch.testing.assert_close(found.sums_R4, torch.tensor(sums).double(), rtol=1e-4, atol=1e-6)
    assert found.targets_R.tolist() == [8, 4, 2]
    _, kl, ce, agreeing = (sum(column) for column in zip(*sums, strict=True))
    n = sum(row.num_targets for row in ROWS)
    assert found.num_targets == n == 14
    assert found.kl == pytest.approx(kl / n, rel=1e-4)
    assert found.cross_entropy == pytest.approx(ce / n, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(ce / n), rel=1e-3)
    assert found.agreement == agreeing / n
    assert found.loss == pytest.approx(0.75 * kl / n + 0.25 * ce / n, rel=1e-4)


def test_the_teacher_agrees_with_itself(
    held_out: HeldOutRows, teacher: CachedTeacher, teacher_model: PreTrainedModel
) -> None:
    found = held_out.measure(teacher_model, head_of(teacher_model), teacher, TokenObjective())
    assert found.kl < 1e-5
    assert found.agreement == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("The student keeps it.", "the student keeps it", 1.0),
        ("nothing at all", "the student", 0.0),
        ("the student", "the student keeps the house", 2 * 1.0 * 0.4 / 1.4),
        ("Привет, мир", "привет мир", 1.0),
        ("", "", 1.0),
        ("", "something", 0.0),
    ],
)
def test_rouge_l_is_the_f_measure_of_common_words(
    answer: str, reference: str, score: float
) -> None:
    assert rouge_l([answer, "same"], [reference, "same"]) == pytest.approx([score, 1.0])


def test_speed_is_measured_alone_and_together(teacher_model: PreTrainedModel) -> None:
    speed = measure_speed(EngineSampler(teacher_model), [[30 + i, 40] for i in range(20)])
    assert speed.alone > 0
    assert speed.batched > 0
    assert speed.num_batched == 8


def test_a_tied_head_is_counted_once(teacher_model: PreTrainedModel) -> None:
    size = size_of(teacher_model)
    embedding = teacher_model.get_input_embeddings().weight.numel()
    assert size["weights_bytes"] == 4 * size["num_parameters"]
    assert size["num_parameters"] < sum(t.numel() for t in teacher_model.state_dict().values())
    assert size["num_parameters"] > embedding
    assert size["num_layers"] == 4
    assert "num_encoder_layers" not in size


@pytest.mark.parametrize("family", ["t5", "bart", "bert2bert"])
def test_an_encoder_decoder_has_layers_on_both_sides(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = load_model(request.getfixturevalue(f"tiny_{family}_dir"))
    size = size_of(keep_layers(model, (0, 3), range(3)))
    assert (size["num_encoder_layers"], size["num_layers"]) == (3, 2)
