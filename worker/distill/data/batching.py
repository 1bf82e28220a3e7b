"""Tensors of a batch of rows. app/contracts/batch_plan.py decides which rows are in a batch.

B batch, T tokens, S source tokens (the input of an encoder), N targets in the order of
`hidden_BTH[keep_BT]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.distill.data.rows import Example


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
