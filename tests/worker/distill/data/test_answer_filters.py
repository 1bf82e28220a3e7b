"""Which answers of a teacher are left out."""

import pytest

from app.contracts.distillation import Reject
from worker.distill.data.answer_filters import is_rejected, repeated_share
from worker.distill.data.sampler import Generation


@pytest.mark.parametrize(
    ("tokens", "is_finished", "rules", "expected"),
    [
        ((1, 2, 3), False, Reject(), False),
        ((1, 2, 3), False, Reject(unfinished=True), True),
        ((1, 2, 3), True, Reject(unfinished=True), False),
        ((1, 2), True, Reject(min_tokens=3), True),
        ((1, 2) * 10, True, Reject(max_repeated_share=0.5), True),
        (tuple(range(20)), True, Reject(max_repeated_share=0.0), False),
    ],
)
def test_rules(tokens: tuple[int, ...], is_finished: bool, rules: Reject, expected: bool) -> None:
    assert is_rejected(Generation(tokens=tokens, is_finished=is_finished), rules) == expected


def test_repeated_share_counts_four_grams_seen_before() -> None:
    assert repeated_share((1, 2, 3, 4, 1, 2, 3, 4)) == pytest.approx(1 / 5)
    assert repeated_share((1, 2)) == 0.0
