"""BERT and RoBERTa as teachers: distributions at masked targets."""

from pathlib import Path

import pytest
import torch

from worker.distill.data.rows import Example
from worker.distill.losses.lm_head import head_of
from worker.distill.students.recipe import load_model
from worker.distill.teachers.masked_lm import MaskedTeacher

MASK = 4
EXAMPLE = Example((2, 20, 21, 22, 3, 30, 31, 32, 33, 34, 3), ((5, 11),))


@pytest.mark.parametrize("folder", ["tiny_bert_dir", "tiny_roberta_dir"])
def test_a_target_is_predicted_with_itself_masked_and_both_its_sides_seen(
    folder: str, request: pytest.FixtureRequest
) -> None:
    model = load_model(request.getfixturevalue(folder))
    hidden_TH = MaskedTeacher(model, MASK, num_passes=3).hidden([EXAMPLE])[0]
    head = head_of(model)
    for number, position in enumerate(EXAMPLE.target_positions):
        ids = torch.tensor([EXAMPLE.token_ids])
        ids[0, [p for i, p in enumerate(EXAMPLE.target_positions) if i % 3 == number % 3]] = MASK
        types = torch.zeros_like(ids)
        if model.config.type_vocab_size > 1:
            types[0, 5:] = 1
        with torch.no_grad():
            expected_V = model(
                ids, attention_mask=torch.ones_like(ids), token_type_ids=types
            ).logits[0, position]
            assert head.bias_V is not None
            logits_V = hidden_TH[number] @ head.weight_VH.T + head.bias_V
        torch.testing.assert_close(logits_V, expected_V, atol=2e-4, rtol=2e-4)


def test_a_teacher_never_sees_the_token_it_predicts(tiny_bert_dir: Path) -> None:
    model = load_model(tiny_bert_dir)
    teacher = MaskedTeacher(model, MASK, num_passes=1)  # every target masked at once
    changed = Example((*EXAMPLE.token_ids[:5], 50, 51, 52, 53, 54, 55), EXAMPLE.spans)
    assert torch.equal(teacher.hidden([EXAMPLE])[0], teacher.hidden([changed])[0])
