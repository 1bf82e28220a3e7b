"""Rules that reject unsuitable answers of the teacher."""

from collections.abc import Sequence

from app.contracts.distillation import Reject
from worker.distill.data.sampler import Generation

NGRAM = 4


def is_rejected(answer: Generation, rules: Reject) -> bool:
    """Returns whether at least one of the rules rejects the answer."""
    if rules.unfinished and not answer.is_finished:
        return True
    if len(answer.tokens) < rules.min_tokens:
        return True
    return (
        rules.max_repeated_share is not None
        and repeated_share(answer.tokens) > rules.max_repeated_share
    )


def repeated_share(tokens: Sequence[int]) -> float:
    """Returns the share of an answer's 4-grams that repeat an earlier one.

    It is close to 1 for a text that loops, and 0 for an answer of fewer than four tokens.
    """
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
