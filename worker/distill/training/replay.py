"""Adaptive replay: the share of steps that learn from rollouts, and a buffer of earlier rollouts.

phi is the share of the steps that take the student's answers. It starts at 0. It is raised when the
held-out loss stops falling, because the rows of the data then have little left to teach.

Source: Ko et al., DistiLLM, arXiv:2402.03898. Its released code raises phi when the held-out
cross-entropy is 0.1 nats above its value at the last raise. The first reference is the untrained
student. That works for students that can already write. A student that lost most of its layers
starts far above that level and never returns to it, so phi would stay 0. Here phi is raised
after each evaluation whose loss fell by less than 0.1 nats.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from worker.distill.data.rows import Example
from worker.errors import CorruptCheckpoint

PHI_STEP = 0.1
EPSILON = 0.1  # nats of held-out cross-entropy
VIEWS = TypeAdapter(tuple[Example, ...])

Choice = Literal["data", "generate", "replay"]


@dataclass(frozen=True)
class Rollout:
    """A row with an answer written by the student, as the student and as the teacher reads it."""

    student: Example
    teacher: Example


def next_phi(phi: float, before: float | None, now: float) -> float:
    """Returns phi after an evaluation.

    `before` is the held-out loss of the previous evaluation, or None for the first. `now` is the
    present one.
    """
    is_raised = before is not None and now > before - EPSILON
    return min(1.0, round(phi + PHI_STEP, 6)) if is_raised else phi


def choose(u: float, phi: float, share_done: float, *, is_full: bool) -> Choice:
    """Returns the source of a step's batch, for a random `u` between 0 and 1.

    New answers become rarer towards the end. The share of steps with the student's answers, new or
    old, stays phi.
    """
    if u < phi * (1.0 - share_done) or (u < phi and not is_full):
        return "generate"
    return "replay" if u < phi else "data"


class ReplayBuffer:
    """The newest `capacity` rollouts."""

    def __init__(self, capacity: int) -> None:
        self.rows: deque[Rollout] = deque(maxlen=capacity)

    @property
    def is_full(self) -> bool:
        return len(self.rows) == self.rows.maxlen

    def add(self, rollouts: Sequence[Rollout]) -> None:
        self.rows.extend(rollouts)

    def sample(self, random: Random, batch_tokens: int) -> list[Rollout]:
        """Returns different rollouts in random order.

        There is at least one, and with padding they have at most `batch_tokens`.
        """
        chosen: list[Rollout] = []
        longest = 0
        for rollout in random.sample(list(self.rows), len(self.rows)):
            longest = max(longest, rollout.student.num_tokens)
            if chosen and longest * (len(chosen) + 1) > batch_tokens:
                break
            chosen.append(rollout)
        return chosen

    def to_jsonl(self) -> bytes:
        """Returns the rollouts as JSON lines, the oldest first.

        A line holds the row as the student reads it, and then as the teacher reads it if that
        differs.
        """
        lines = [
            (row.student,) if row.student == row.teacher else (row.student, row.teacher)
            for row in self.rows
        ]
        return b"".join(VIEWS.dump_json(views) + b"\n" for views in lines)

    def load(self, path: Path) -> None:
        """Appends the rollouts of a file. Raises CorruptCheckpoint."""
        try:
            for line in path.read_bytes().splitlines():
                views = VIEWS.validate_json(line)
                self.rows.append(Rollout(views[0], views[-1]))
        except (OSError, ValidationError) as e:
            raise CorruptCheckpoint(
                f"{path.name} cannot be read: {e}; resume from an older checkpoint"
            ) from e
