"""Rows behind a common beginning that is computed once, against rows computed whole."""

from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny
from worker.distill.data.rows import Example
from worker.distill.forward.shared_prefix import LEAST_TOKENS, shared_prefix
from worker.distill.students.recipe import load_model
from worker.distill.teachers.cached_teacher import LiveTeacher
from worker.models.architectures import CAUSAL

BEGIN = tuple(range(10, 10 + LEAST_TOKENS))


def row(*own: int, begin: tuple[int, ...] = BEGIN, num_prompt: int = 2) -> Example:
    tokens = (*begin, *own)
    return Example(tokens, ((len(begin) + num_prompt, len(tokens)),))


ROWS = [row(30, 31, 32, 33, 34), row(30, 41, 42), row(50, 51, 52, 53)]


def test_what_all_rows_begin_with_is_found() -> None:
    assert shared_prefix(ROWS) == BEGIN
    assert shared_prefix(ROWS[:2]) == (*BEGIN, 30)
    # the second own token predicts a target
    assert shared_prefix([ROWS[0], ROWS[0]]) == (
        *BEGIN,
        30,
    )


def test_targets_are_behind_it() -> None:
    early = row(30, 41, 42, num_prompt=-2)
    assert shared_prefix([*ROWS, early]) == ()  # six tokens before the first prediction are too few
    assert shared_prefix([*ROWS, row(60, 61, num_prompt=1)]) == BEGIN


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ROWS[:1],
        [*ROWS, row(30, 31, 32, begin=(7,))],
        [Example((1, 2, 3), ((1, 3),), source_ids=BEGIN)] * 2,
    ],
    ids=["none", "one", "one unlike the others", "read by an encoder"],
)
def test_too_little_is_nothing(rows: list[Example]) -> None:
    assert shared_prefix(rows) == ()


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_a_teacher_gives_the_same_rows_behind_a_prefix(family: str, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path, family, num_layers=2)).requires_grad_(False)
    stranger = row(30, 31, 32, begin=(7, 8))
    asked = [*ROWS, stranger]
    calls: list[int] = []
    teacher = LiveTeacher(model, shared_prefix(ROWS))
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = teacher.hidden(asked)
    # last tokens are only targets
    assert sorted(calls) == sorted([2, 3, 4, len(stranger.token_ids) - 1])
    for behind_TH, whole_TH in zip(found, LiveTeacher(model).hidden(asked), strict=True):
        # float32 sums in another order
        torch.testing.assert_close(behind_TH, whole_TH, atol=1e-5, rtol=1e-5)


def test_a_row_has_the_same_bits_whatever_is_beside_it(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path, "llama", num_layers=2)).requires_grad_(False)
    teacher = LiveTeacher(model, BEGIN)
    together = teacher.hidden(ROWS)
    for example, hidden_TH in zip(ROWS, together, strict=True):
        assert torch.equal(LiveTeacher(model, BEGIN).hidden([example])[0], hidden_TH)
