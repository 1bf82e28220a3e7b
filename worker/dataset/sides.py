"""Splits questions into training, validation and test so that similar questions stay together.

The side of a question is a hash of its text, so it never changes as data grows. If similar questions
have different sides, the side with most rows is kept and the other rows are left out. A row that
was trained on is therefore never evaluated in a later data set, and the other way round.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from app.contracts.datasets import Side

# If two sides of a group have as many rows, the first of these is kept.
PREFERRED: Final[tuple[Side, ...]] = ("test", "validation", "training")


def side_of(question: str, validation_fraction: float, test_fraction: float) -> Side:
    """Returns the side of a normalised question."""
    digest = hashlib.sha256(b"side\0" + question.encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "training"


@dataclass
class Groups:
    """Groups of similar questions, by union-find. Questions are numbered from 0."""

    _parents: list[int] = field(default_factory=list)

    def add(self) -> int:
        """Adds a question in a group of its own and returns its number."""
        self._parents.append(len(self._parents))
        return self._parents[-1]

    def group_of(self, question: int) -> int:
        """Returns the smallest number in the question's group."""
        while self._parents[question] != question:
            self._parents[question] = self._parents[self._parents[question]]
            question = self._parents[question]
        return question

    def join(self, one: int, other: int) -> None:
        """Joins the groups of two questions."""
        one, other = self.group_of(one), self.group_of(other)
        self._parents[max(one, other)] = min(one, other)


def kept_sides(groups: Sequence[int], sides: Sequence[Side]) -> list[Side | None]:
    """Returns the side of each row, or None if its group is kept on another side.

    groups, sides: The group of each row's question, and the side of the question.
    """
    counts: dict[int, Counter[Side]] = {}
    for group, side in zip(groups, sides, strict=True):
        counts.setdefault(group, Counter())[side] += 1
    kept = {
        group: max(PREFERRED, key=lambda side: (count[side], -PREFERRED.index(side)))
        for group, count in counts.items()
    }
    return [
        side if kept[group] == side else None for group, side in zip(groups, sides, strict=True)
    ]
