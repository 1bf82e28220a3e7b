"""Adaptive replay: how often the student answers for itself, and the answers that it gave before.

phi is the share of the steps that take the student's answers. It is raised when the held-out loss no longer falls, for then
the rows of the data have taught what they can.
Source: Ko et al., DistiLLM, arXiv:2402.03898. Its released code raises phi when the held-out cross-entropy is 0.1 nats
above what it was at the last raise, at first that of the untrained student. It trains students that already write; one
that lost most of its layers begins at 10 nats or more and never gets back there, so that phi would stay 0. Here it is
raised by an evaluation that is not 0.1 nats below the one before.
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
    """A row with an answer of the student's own, as the student and as the teacher reads it."""

    student: Example
    teacher: Example


def next_phi(phi: float, before: float | None, now: float) -> float:
    """phi after an evaluation, from the held-out loss of the one before (None: there was none) and its own."""
    is_raised = before is not None and now > before - EPSILON
    return min(1.0, round(phi + PHI_STEP, 6)) if is_raised else phi


def choose(u: float, phi: float, share_done: float, *, is_full: bool) -> Choice:
    """Where a step's batch comes from: fresh answers become rarer towards the end, the student's as such do not."""
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
        """Different rows in a random order, as many as fit with padding, and at least one."""
        chosen: list[Rollout] = []
        longest = 0
        for rollout in random.sample(list(self.rows), len(self.rows)):
            longest = max(longest, rollout.student.num_tokens)
            if chosen and longest * (len(chosen) + 1) > batch_tokens:
                break
            chosen.append(rollout)
        return chosen

    def to_jsonl(self) -> bytes:
        """Oldest first; a line holds the student's view, then the teacher's if that is another."""
        lines = [
            (row.student,) if row.student == row.teacher else (row.student, row.teacher)
            for row in self.rows
        ]
        return b"".join(VIEWS.dump_json(views) + b"\n" for views in lines)

    def load(self, path: Path) -> None:
        """Raises CorruptCheckpoint."""
        try:
            for line in path.read_bytes().splitlines():
                views = VIEWS.validate_json(line)
                self.rows.append(Rollout(views[0], views[-1]))
        except (OSError, ValidationError) as e:
            raise CorruptCheckpoint(
                f"{path.name} cannot be read: {e}; go on from an older checkpoint"
            ) from e
