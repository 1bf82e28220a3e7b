"""Classification metrics, for data whose targets are few and short and therefore labels."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.contracts.run_limits import MAX_LABEL_TOKENS, MAX_LABELS, ROWS_PER_LABEL
from worker.distill.evaluation.bootstrap import Figure, macro_f1, mean

AROUND = " \t\n.,!?:;\"'`"


@dataclass(frozen=True)
class Labels:
    """The distinct targets. `max_tokens` is the length of the longest one."""

    names: tuple[str, ...]
    max_tokens: int

    def of(self, answer: str) -> str | None:
        """Returns the label that an answer equals, or None.

        Upper and lower case, and punctuation around the answer, do not matter.
        """
        name = normalised(answer)
        return name if name in self.names else None

    def figures(self, answers: Sequence[str], targets: Sequence[str]) -> tuple[Figure, Figure]:
        """Returns accuracy and macro-F1. A target that is no label always counts as missed.

        Such targets occur if the teacher writes them.
        """
        predicted, actual = (
            [self.of(text) or "" for text in texts] for texts in (answers, targets)
        )
        is_right = [
            bool(name) and name == answer for name, answer in zip(actual, predicted, strict=True)
        ]
        return mean(is_right), macro_f1(predicted, actual, self.names)


def find_labels(references: Sequence[str], num_tokens: Sequence[int]) -> Labels | None:
    """Returns the labels of the references, or None if they are not labels.

    Labels are few and short, and occur several times each on average.
    """
    labels = read_labels(references, num_tokens)
    if (
        labels is None
        or not 2 <= len(labels.names) <= MAX_LABELS
        or labels.max_tokens > MAX_LABEL_TOKENS
    ):
        return None
    return labels


def read_labels(references: Sequence[str], num_tokens: Sequence[int]) -> Labels | None:
    """Returns the references as labels of any number and length.

    Returns None if they hardly repeat, and so are not classes.
    """
    names = tuple(sorted({normalised(reference) for reference in references} - {""}))
    if not names or len(references) < ROWS_PER_LABEL * len(names):
        return None
    return Labels(names, max(num_tokens))


def normalised(text: str) -> str:
    """Returns a text in lower case, with single spaces and without punctuation around it.

    A text of punctuation alone keeps it.
    """
    plain = " ".join(text.casefold().split())
    return plain.strip(AROUND) or plain
