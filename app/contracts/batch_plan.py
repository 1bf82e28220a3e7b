"""Batches of rows of similar length with a limited number of tokens, and the steps of a training.

The trainer builds its batches with this module, and an estimate counts the same steps before the
job runs.
"""

from collections.abc import Sequence
from functools import lru_cache
from random import Random

from app.contracts.distillation import Hyperparameters

CPU_BATCH_TOKENS = 1024  # larger batches do not make a CPU faster
# The largest automatic batch per process on a GPU. It does not depend on the memory, which only
# decides into how many micro-batches a batch is divided.
DEVICE_BATCH_TOKENS = 8192
LEAST_EPOCH_STEPS = 200  # an automatic batch is smaller if an epoch would have fewer steps
# Share of a row's length. It mixes the batches of different epochs and adds only little padding.
BUCKET_JITTER = 0.15
MOST_EVALS, FEWEST_EVALS = 10, 3
# Most time that evaluations take if there are more than FEWEST_EVALS, as a share of the training's.
EVAL_SHARE = 0.15
FORWARDS_PER_STEP = 3  # a step takes about as long as this number of forward passes


def batch_tokens_of(
    h: Hyperparameters, *, device: str = "cpu", num_tokens: int = 0, num_processes: int = 1
) -> int:
    """Returns the tokens per batch, including padding.

    On a GPU, the automatic number depends on the `num_tokens` of an epoch and on the number of
    processes that share a batch.
    """
    if h.batch_tokens != "auto":
        return h.batch_tokens
    if device == "cpu":
        return CPU_BATCH_TOKENS
    most = DEVICE_BATCH_TOKENS * num_processes
    return min(most, max(CPU_BATCH_TOKENS, num_tokens // LEAST_EPOCH_STEPS))


class BatchPlan:
    """Batches of row indices, which depend only on the lengths, the seed and the epoch.

    Each row occurs once per epoch. A batch has at most `batch_tokens` tokens including padding; a
    longer row forms a batch of its own. With `batch_rows`, a batch has this number of rows instead.
    `pieces` divides a batch into micro-batches of at most `micro_tokens` tokens. The default of
    `micro_tokens` is `batch_tokens`.

    In epoch 0 rows are sorted by their exact length, so only the order of the batches depends on
    the seed. In later epochs the sort keys are jittered, so that batches consist of different rows.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_tokens: int,
        seed: int,
        batch_rows: int | None = None,
        micro_tokens: int | None = None,
    ) -> None:
        self.lengths = lengths
        self.batch_tokens = batch_tokens
        self.batch_rows = batch_rows
        self.micro_tokens = micro_tokens or batch_tokens
        self.seed = seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> list[list[int]]:
        random = Random(f"{self.seed}:{number}")
        spread = BUCKET_JITTER if number else 0.0
        keys = [length * (1 + random.uniform(-spread, spread)) for length in self.lengths]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        if self.batch_rows is None:
            batches = cut_batches(order, self.lengths, self.batch_tokens)
        else:
            starts = range(0, len(order), self.batch_rows)
            batches = [order[start : start + self.batch_rows] for start in starts]
        random.shuffle(batches)
        return batches

    def pieces(self, rows: Sequence[int]) -> list[list[int]]:
        """Returns the micro-batches of a batch, or of a rank's share of it."""
        if self.batch_rows is None and self.micro_tokens >= self.batch_tokens:
            return [list(rows)] if rows else []
        return cut_batches(rows, self.lengths, self.micro_tokens)

    def num_steps(self, num_epochs: int, *, at_most: int | None = None) -> int:
        """Returns the number of batches in `num_epochs` epochs, limited to `at_most`."""
        total = 0
        for number in range(num_epochs):
            total += len(self.epoch(number))
            if at_most is not None and total >= at_most:
                return at_most
        return total


def cut_batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Returns batches of consecutive rows of `order`.

    The length of the longest row times the number of rows is at most `batch_tokens`, except for a
    single row that is longer.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in order:
        longest = max(longest, lengths[row])
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = lengths[row]
    return batches


def eval_steps_of(
    h: Hyperparameters, plan: BatchPlan, total_steps: int, num_held_out_tokens: int
) -> int:
    """Returns the steps between two evaluations. For "auto" there are fewer with many held-out rows.

    Early stopping counts evaluations, so it always gets `MOST_EVALS`.
    """
    if h.eval_steps != "auto":
        return h.eval_steps
    num_epochs = total_steps / len(plan.epoch(0))
    num_trained = num_epochs * sum(plan.lengths)
    affordable = round(EVAL_SHARE * FORWARDS_PER_STEP * num_trained / max(1, num_held_out_tokens))
    num_evals = min(MOST_EVALS, max(FEWEST_EVALS, affordable))
    return max(1, -(-total_steps // (MOST_EVALS if h.early_stopping else num_evals)))
