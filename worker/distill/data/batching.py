"""Batches of rows of similar length with a limited number of tokens, and their tensors.

B batch, T tokens, S source tokens (the input of an encoder), N targets in the order of
`hidden_BTH[keep_BT]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
from torch import Tensor

from worker.distill.data.rows import Example

# Share of a row's length. It mixes the batches of different epochs and adds only little padding.
BUCKET_JITTER = 0.15


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; a causal model needs no attention mask for such padding.

    `keep_BT` is true at the positions that predict a target. The source tensors are None for models
    without an encoder.
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
        """Number of tokens without padding, including the source."""
        num_source = 0 if self.source_mask_BS is None else int(self.source_mask_BS.sum())
        return int(self.attention_mask_BT.sum()) + num_source


def collate(examples: Sequence[Example], indices: Sequence[int], device: str = "cpu") -> Batch:
    """Returns a batch of the examples with these indices.

    The last token of a row is only a target, so it is not part of the model's input.
    """
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
    """Returns the padded token ids and the attention mask.

    Rows are padded with their own last token. The value does not matter, but transformers warns
    about pad tokens in an input without a mask.
    """
    longest = max(len(ids) for ids in rows)
    ids_BT = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in rows])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows])
    return ids_BT, mask_BT


def model_input(row: Example) -> tuple[int, ...]:
    """Returns the tokens of a row that the model (or its decoder) reads."""
    return row.token_ids[:-1]


def kept_positions(row: Example) -> list[int]:
    """Returns the positions that predict the targets: one before each target."""
    return [p - 1 for p in row.target_positions]


class BatchPlan:
    """Batches of row indices, which depend only on the lengths, the seed and the epoch.

    Each row occurs once per epoch. A batch has at most `batch_tokens` tokens including padding; a
    longer row forms a batch of its own. With `batch_rows`, a batch has this number of rows instead,
    and `pieces` divides it into micro-batches of at most `batch_tokens` tokens.

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
    ) -> None:
        self.lengths = lengths
        self.batch_tokens = batch_tokens
        self.batch_rows = batch_rows
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
        if self.batch_rows is None:
            return [list(rows)] if rows else []
        return cut_batches(rows, self.lengths, self.batch_tokens)

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
