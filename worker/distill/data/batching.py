"""Tensors of a batch of rows. app/contracts/batch_plan.py decides which rows are in a batch.

B batch, T tokens, S source tokens (the input of an encoder), N targets or other selected positions,
row by row. P selected positions of the row that has most of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.distill.data.rows import Example
from worker.host_copies import to_device


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; a causal model needs no attention mask for such padding.

    `keep_BT` is true at the positions that predict a target. `positions_N` has the same positions
    as numbers in the flattened batch [B * T]: to select by numbers, the host need not wait for a
    GPU. `num_tokens` is the number of tokens without padding, including the source. The source
    tensors are None for models without an encoder.
    """

    rows: tuple[Example, ...]
    indices: tuple[int, ...]
    num_tokens: int
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    keep_BT: Tensor
    positions_N: Tensor
    targets_N: Tensor
    source_ids_BS: Tensor | None = None
    source_mask_BS: Tensor | None = None

    @property
    def num_targets(self) -> int:
        return len(self.targets_N)


def collate(examples: Sequence[Example], indices: Sequence[int], device: str = "cpu") -> Batch:
    """Returns a batch of the examples with these indices.

    The last token of a row is only a target, so it is not part of the model's input.
    """
    rows = [examples[i] for i in indices]
    input_ids_BT, attention_mask_BT = pad([model_input(row) for row in rows])
    num_columns = input_ids_BT.shape[1]
    positions_N = flat_positions([kept_positions(row) for row in rows], num_columns)
    keep_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    keep_BT.view(-1)[positions_N] = True
    targets_N = torch.tensor([row.token_ids[p] for row in rows for p in row.target_positions])
    tensors = [input_ids_BT, attention_mask_BT, keep_BT, positions_N, targets_N]
    if rows[0].source_ids:
        tensors += pad([row.source_ids for row in rows])
    num_tokens = sum(row.num_tokens - 1 for row in rows)
    return Batch(
        tuple(rows), tuple(indices), num_tokens, *(to_device(tensor, device) for tensor in tensors)
    )


def flat_positions(positions: Sequence[Sequence[int]], num_columns: int) -> Tensor:
    """Returns positions of each row as numbers in the flattened batch [B * num_columns]."""
    numbers = [row * num_columns + p for row, places in enumerate(positions) for p in places]
    return torch.tensor(numbers, dtype=torch.int64)


@dataclass(frozen=True)
class Selection:
    """Positions of each row of a batch, on the device of the batch.

    `positions_N` are numbers in the flattened batch. `places_N` are the numbers of the same
    positions in a table [B, P], in which each row begins with its selected positions. `mask_BP` is
    true where that table has an entry.
    """

    positions_N: Tensor
    places_N: Tensor
    mask_BP: Tensor

    @classmethod
    def of(
        cls, positions: Sequence[Sequence[int]], num_columns: int, device: torch.device
    ) -> "Selection":
        """Returns the selection of these positions of rows that are padded to `num_columns`."""
        longest = max(map(len, positions))
        lengths_B1 = torch.tensor([len(places) for places in positions])[:, None]
        tensors = (
            flat_positions(positions, num_columns),
            flat_positions([range(len(places)) for places in positions], longest),
            torch.arange(longest) < lengths_B1,
        )
        return cls(*(to_device(tensor, device) for tensor in tensors))

    @classmethod
    def of_batch(cls, batch: Batch, *, is_source: bool, is_all: bool) -> "Selection":
        """Returns all positions of the source, or `read_positions` of the batch.

        They are computed from the rows: to count the entries of a mask, the host would wait for a
        GPU.
        """
        device = batch.input_ids_BT.device
        if is_source:
            assert batch.source_ids_BS is not None
            sources = [range(len(row.source_ids)) for row in batch.rows]
            return cls.of(sources, batch.source_ids_BS.shape[1], device)
        positions = read_positions(batch.rows, is_all=is_all)
        return cls.of(positions, batch.input_ids_BT.shape[1], device)


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


def read_positions(rows: Sequence[Example], *, is_all: bool) -> list[Sequence[int]]:
    """Returns all positions of each row that a model reads, or those that predict targets."""
    return [range(len(model_input(row))) if is_all else kept_positions(row) for row in rows]
