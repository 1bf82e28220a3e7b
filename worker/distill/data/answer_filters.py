"""Which of the teacher's answers are not fit to learn from."""

from collections.abc import Sequence

from app.contracts.distillation import Reject
from worker.distill.data.sampler import Generation

NGRAM = 4


def is_rejected(answer: Generation, rules: Reject) -> bool:
    """Whether any of the rules leaves the answer out."""
    if rules.unfinished and not answer.is_finished:
        return True
    if len(answer.tokens) < rules.min_tokens:
        return True
    return (
        rules.max_repeated_share is not None
        and repeated_share(answer.tokens) > rules.max_repeated_share
    )


def repeated_share(tokens: Sequence[int]) -> float:
    """Of the 4-grams of an answer, the share that occurred before in it: near 1 for a text that loops."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
