"""Which choices best_of keeps, and that each comes whole."""

import pytest

from app.contracts.generation import Delta, TokenLogprob
from worker.serve.text.best_of import BestOf

ENTRIES = tuple(TokenLogprob(token=letter, logprob=-1.0, bytes=()) for letter in "ab")


@pytest.fixture
def held() -> BestOf:
    """Three choices whose means are -2, -0.5 and -1."""
    best_of = BestOf(3)
    for choice, logprobs in enumerate(([-2.0], [-0.1, -0.9], [-1.0, -1.0, -1.0])):
        for logprob in logprobs:
            best_of.record(choice, logprob)
        best_of.hold(Delta(id="r", choice=choice, text="a", tokens=(choice,), logprobs=ENTRIES[:1]))
        end = Delta(
            id="r", choice=choice, text="b", tokens=(9,), logprobs=ENTRIES[1:], finish_reason="stop"
        )
        best_of.hold(end)
    return best_of


def test_the_best_by_mean_come_first_and_are_numbered_anew(held: BestOf) -> None:
    assert [(delta.choice, delta.tokens[0]) for delta in held.best(2)] == [(0, 1), (1, 2)]


def test_a_choice_comes_in_one_piece(held: BestOf) -> None:
    [best] = held.best(1)
    assert best == Delta(
        id="r", choice=0, text="ab", tokens=(1, 9), logprobs=ENTRIES, finish_reason="stop"
    )
