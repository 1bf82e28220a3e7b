"""Tensors of a batch of rows. app/contracts/batch_plan.py decides which rows are in a batch.

B batch, T tokens, S source tokens (the input of an encoder), N targets, row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.distill.data.rows import Example


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; a causal model needs no attention mask for such padding.

    `keep_BT` is true at the positions that predict a target. `positions_N` has the same positions
    as numbers in the flattened batch [B * T]: to select by numbers, the host need not wait for a
    GPU. `num_tokens` is the number of tokens without padding, including the source. The source
    tensors are None for models without an encoder.
    """

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
    numbers = [b * num_columns + p for b, row in enumerate(rows) for p in kept_positions(row)]
    positions_N = torch.tensor(numbers, dtype=torch.int64)
    keep_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    keep_BT.view(-1)[positions_N] = True
    targets_N = torch.tensor([row.token_ids[p] for row in rows for p in row.target_positions])
    tensors = [input_ids_BT, attention_mask_BT, keep_BT, positions_N, targets_N]
    if rows[0].source_ids:
        tensors += pad([row.source_ids for row in rows])
    num_tokens = sum(row.num_tokens - 1 for row in rows)
    return Batch(tuple(indices), num_tokens, *(to_device(tensor, device) for tensor in tensors))


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Moves a tensor from the CPU to a device. The host does not wait for the copy.

    Only a copy from pinned memory is asynchronous. Any other one waits for all work that the GPU
    has still to do.
    """
    if torch.device(device).type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
