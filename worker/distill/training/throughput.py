"""Training speed, remaining time, and averages of the training metrics."""

import time

from worker.distill.training.checkpoint import TrainState


class Throughput:
    """Speed since the start of this attempt, and the training time including earlier ones."""

    def __init__(self, state: TrainState, total_steps: int) -> None:
        self._begun = time.monotonic()
        self._before = state.trained_seconds
        self._num_left = total_steps - state.step
        self._num_steps = self._num_tokens = 0
        self._left_out = 0.0

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._begun

    @property
    def tokens_per_second(self) -> float:
        """Tokens learned from per second. Time that `count` left out does not count."""
        return round(
            self._num_tokens / max(1e-6, time.monotonic() - self._begun - self._left_out), 1
        )

    @property
    def seconds_remaining(self) -> float | None:
        if not self._num_steps:
            return None
        per_step = (time.monotonic() - self._begun) / self._num_steps
        return round(per_step * (self._num_left - self._num_steps), 1)

    def count(self, num_tokens: int, *, seconds_left_out: float = 0.0) -> None:
        """Counts a step.

        `seconds_left_out` of its time were spent on generation. They are not part of the speed, but
        of the remaining time.
        """
        self._left_out += seconds_left_out
        self._num_steps += 1
        self._num_tokens += num_tokens


class MetricAverager:
    """Per-token averages of the training metrics since the last call of `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._num_targets = 0

    def add(
        self,
        num_targets: int,
        *,
        loss_sum: float,
        kl_sum: float | None = None,
        num_agreeing: float | None = None,
        num_correct: float | None = None,
        **others: float,
    ) -> None:
        """Adds a step. `others` are means already. Metrics that are None get no series."""
        self._num_targets += num_targets
        sums = {
            "train_loss": loss_sum,
            "train_kl": kl_sum,
            "train_agreement": num_agreeing,
            "train_mean_token_accuracy": num_correct,
        }
        named = {name: float(value) for name, value in sums.items() if value is not None}
        named |= {name: value * num_targets for name, value in others.items()}
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in named.items()}

    def take(self) -> dict[str, float]:
        means = {name: value / self._num_targets for name, value in self._sums.items()}
        self._sums, self._num_targets = {}, 0
        return means
