"""Length-bucketed token-budget batches, and their tensors.

B batch, T tokens, S source tokens (what an encoder reads), N rows (completion positions in the order of hidden_BTH[keep_BT]).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
from torch import Tensor

from worker.distill.data.rows import Example

BUCKET_JITTER = (
    0.15  # of a row's length: enough to mix neighbours between epochs, little enough to pad little
)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, which a causal model needs no mask for. keep_BT marks what predicts a target.

    The source is None where no encoder is.
    """

    indices: tuple[int, ...]
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    keep_BT: Tensor
    targets_N: Tensor
    source_ids_BS: Tensor | None = None
    source_mask_BS: Tensor | None = None

    @property
    def num_targets(self) -> int:
        return len(self.targets_N)

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        num_source = 0 if self.source_mask_BS is None else int(self.source_mask_BS.sum())
        return int(self.attention_mask_BT.sum()) + num_source


def collate(examples: Sequence[Example], indices: Sequence[int], device: str = "cpu") -> Batch:
    """The rows with these numbers; a row's last token is a target only, so the model does not read it."""
    rows = [examples[i] for i in indices]
    input_ids_BT, attention_mask_BT = pad([model_input(row) for row in rows])
    keep_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for b, row in enumerate(rows):
        keep_BT[b, kept_positions(row)] = True
    targets_N = torch.tensor([row.token_ids[p] for row in rows for p in row.target_positions])
    tensors = [input_ids_BT, attention_mask_BT, keep_BT, targets_N]
    if rows[0].source_ids:
        tensors += pad([row.source_ids for row in rows])
    return Batch(tuple(indices), *(tensor.to(device) for tensor in tensors))


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask. Any token will do for padding; transformers warns of a pad token without a mask."""
    longest = max(len(ids) for ids in rows)
    ids_BT = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in rows])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows])
    return ids_BT, mask_BT


def model_input(row: Example) -> tuple[int, ...]:
    """What the model reads of a row."""
    return row.token_ids[:-1]


def kept_positions(row: Example) -> list[int]:
    """Where it predicts a target: one before each."""
    return [p - 1 for p in row.target_positions]


class BatchPlan:
    """Batches of row numbers, by (seed, epoch) alone: each row once an epoch, at most `batch_tokens` with padding.

    The batches of epoch 0 hold rows sorted by length alone, whatever the seed, and only come in a random order; later
    epochs mix neighbours. A row longer than `batch_tokens` has a batch to itself.
    """

    def __init__(self, lengths: Sequence[int], *, batch_tokens: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> list[list[int]]:
        random = Random(f"{self.seed}:{number}")
        spread = BUCKET_JITTER if number else 0.0
        keys = [length * (1 + random.uniform(-spread, spread)) for length in self.lengths]
        batches = cut_batches(
            sorted(range(len(keys)), key=keys.__getitem__), self.lengths, self.batch_tokens
        )
        random.shuffle(batches)
        return batches

    def num_steps(self, num_epochs: int, *, at_most: int | None = None) -> int:
        """Batches in so many epochs, counted no further than `at_most`."""
        total = 0
        for number in range(num_epochs):
            total += len(self.epoch(number))
            if at_most is not None and total >= at_most:
                return at_most
        return total


def cut_batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Consecutive rows of `order` packed so that (longest row) * (rows) stays within `batch_tokens`."""
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
