"""Answers as labels: data whose targets are few and short is classification, and is judged as such as well."""

from collections.abc import Sequence
from dataclasses import dataclass

from worker.distill.evaluation.bootstrap import Figure, macro_f1, mean

MAX_LABELS = 20
MAX_LABEL_TOKENS = 8
ROWS_PER_LABEL = 2  # at least, on average
AROUND = " \t\n.,!?:;\"'`"


@dataclass(frozen=True)
class Labels:
    """The distinct targets; max_tokens is the length of the longest."""

    names: tuple[str, ...]
    max_tokens: int

    def of(self, answer: str) -> str | None:
        """The label an answer equals, letters' case and what surrounds it aside; None if it is no label."""
        name = normalised(answer)
        return name if name in self.names else None

    def figures(self, answers: Sequence[str], targets: Sequence[str]) -> tuple[Figure, Figure]:
        """Accuracy and macro-F1. A target that is no label (a teacher may say anything) is never met."""
        predicted, actual = (
            [self.of(text) or "" for text in texts] for texts in (answers, targets)
        )
        is_right = [
            bool(name) and name == answer for name, answer in zip(actual, predicted, strict=True)
        ]
        return mean(is_right), macro_f1(predicted, actual, self.names)


def find_labels(references: Sequence[str], num_tokens: Sequence[int]) -> Labels | None:
    """The labels of classification-style references: few, short, and each met again; else None."""
    labels = read_labels(references, num_tokens)
    if (
        labels is None
        or not 2 <= len(labels.names) <= MAX_LABELS
        or labels.max_tokens > MAX_LABEL_TOKENS
    ):
        return None
    return labels


def read_labels(references: Sequence[str], num_tokens: Sequence[int]) -> Labels | None:
    """The references as labels whatever their number and length, None where they hardly repeat and so are no classes."""
    names = tuple(sorted({normalised(reference) for reference in references} - {""}))
    if not names or len(references) < ROWS_PER_LABEL * len(names):
        return None
    return Labels(names, max(num_tokens))


def normalised(text: str) -> str:
    """Lower case, single spaces, without punctuation around it unless there is nothing else."""
    plain = " ".join(text.casefold().split())
    return plain.strip(AROUND) or plain
