"""How many cores a step takes: while few rows of a fast model run, one is left to those who carry its tokens.

API and clients need a good part of a core for tokens that come fast. Where a step takes every core they wait for it, and its
threads, one of them held up, for each other (bench/LOG.md).
"""

from dataclasses import dataclass

import torch

FEW_ROWS = 8  # more are bound by arithmetic, which a core less would slow down
FAST_SECONDS = (
    0.06  # to the first token; a slower model gives so few tokens a second that carrying them takes no core
)


@dataclass
class StepThreads:
    """Of one engine; what is used is set for the thread that calls."""

    num_all: int
    num_few: int

    @classmethod
    def of_this_thread(cls) -> "StepThreads":
        """All of them for every step, until the model is known to be fast."""
        return cls(torch.get_num_threads(), torch.get_num_threads())

    def settle(self, first_token_seconds: float) -> None:
        """Leaves a core, or not, by the time to a short prompt's first token."""
        is_fast = first_token_seconds <= FAST_SECONDS
        self.num_few = max(1, self.num_all - 1) if is_fast else self.num_all

    def use_all(self) -> None:
        torch.set_num_threads(self.num_all)

    def use_for(self, num_rows: int) -> None:
        """For a step that gives so many rows a token each."""
        torch.set_num_threads(self.num_few if num_rows <= FEW_ROWS else self.num_all)
