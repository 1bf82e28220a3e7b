"""Packs a batch into one sequence without padding, and with the shared beginning only once.

Used for training on a CPU. Chats often begin alike: with a system prompt, or with the first words
of a template. The causal states of a common beginning are the same in all rows. Every layer
computes them once, and all rows attend to their keys and values. Only the attention knows about
rows; all other modules work per token.

B rows, L own tokens of the longest row, P tokens of the packed sequence, p shared tokens; S = p + L
keys; H query heads, K key heads, D head width.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from worker.cpu import (
    SHORT_ATTENTION,
    Attended,
    attending,
    attention,
    attention_gradients,
)
from worker.distill.data.batching import Batch

LEAST_SAVED = 0.1  # share of tokens; a smaller saving does not repay the packing
MOST_SCORES = 2**23  # attention weights that a layer keeps for the backward pass


@dataclass(frozen=True)
class Packing:
    """Layout of a packed batch: the shared tokens first, then the own tokens of each row."""

    num_shared: int
    own_lengths: tuple[int, ...]

    @cached_property
    def is_own_BL(self) -> Tensor:
        """True where a padded table of own tokens holds a token."""
        return torch.arange(max(self.own_lengths)) < torch.tensor(self.own_lengths)[:, None]

    @cached_property
    def places_BL(self) -> Tensor:
        """Index of each own token in the packed sequence. Padding points at the first token."""
        places_BL = torch.zeros_like(self.is_own_BL, dtype=torch.int64)
        places_BL[self.is_own_BL] = torch.arange(
            self.num_shared, self.num_shared + sum(self.own_lengths)
        )
        return places_BL

    @cached_property
    def hidden_LS(self) -> Tensor:
        """True for keys that an own token must not see.

        Padding needs no mask: it comes after all tokens of its row.
        """
        longest = max(self.own_lengths)
        return torch.ones(longest, self.num_shared + longest, dtype=torch.bool).triu(
            self.num_shared + 1
        )

    @cached_property
    def position_ids_1P(self) -> Tensor:
        own = [
            torch.arange(self.num_shared, self.num_shared + length) for length in self.own_lengths
        ]
        return torch.cat([torch.arange(self.num_shared), *own])[None]

    def packed(self, table_BT: Tensor) -> Tensor:
        """Returns the packed sequence [1, P] of a table with one entry per token."""
        own_BL = table_BT[:, self.num_shared : self.num_shared + max(self.own_lengths)]
        return torch.cat([table_BT[0, : self.num_shared], own_BL[self.is_own_BL]])[None]


def packing_of(
    model: PreTrainedModel, batch: Batch, most_scores: int = MOST_SCORES
) -> Packing | None:
    """Returns the packing of a batch, or None if it is impossible or saves too little."""
    if batch.source_ids_BS is not None or not _can_pack(model, batch):
        return None
    lengths = batch.attention_mask_BT.sum(dim=1)
    is_alike_T = (batch.input_ids_BT == batch.input_ids_BT[0]).all(dim=0) & ~batch.keep_BT.any(
        dim=0
    )
    num_shared = min(int(is_alike_T.long().cumprod(dim=0).sum()), int(lengths.min()) - 1)
    if len(lengths) == 1:
        num_shared = 0
    packing = Packing(num_shared, tuple((lengths - num_shared).tolist()))
    num_packed = num_shared + sum(packing.own_lengths)
    longest = max(packing.own_lengths)
    num_scores = len(lengths) * model.config.num_attention_heads * longest * (num_shared + longest)
    is_worth_it = num_packed <= (1 - LEAST_SAVED) * batch.input_ids_BT.numel()
    return packing if is_worth_it and num_scores <= most_scores else None


def _can_pack(model: PreTrainedModel, batch: Batch) -> bool:
    config = model.config
    window = getattr(config, "sliding_window", None)
    return (
        config._attn_implementation == SHORT_ATTENTION
        and model.device.type == "cpu"
        and model.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and (window is None or window >= batch.input_ids_BT.shape[1])
        and "position_ids"
        in signature(model.base_model.forward).parameters  # BLOOM derives positions from the mask
    )


def attending_packed(packing: Packing) -> AbstractContextManager[None]:
    """Context manager in which this thread's attention works on sequences packed in this way."""
    return attending(partial(attend_packed, packing))


def attend_packed(
    packing: Packing, query_1HPD: Tensor, key_1KPD: Tensor, value_1KPD: Tensor, scaling: float
) -> Tensor:
    """Returns the attention of a packed sequence, [1, P, H, D].

    Shared tokens attend to shared tokens up to themselves. The own tokens of a row attend to all
    shared tokens and to the own tokens of the row up to themselves.
    """
    # torch leaves apply untyped
    out_1PHD: Tensor = _Packed.apply(query_1HPD, key_1KPD, value_1KPD, packing, scaling)  # type: ignore[no-untyped-call]
    return out_1PHD


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(  # ctx is Any: torch does not type what a context carries
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float
    ) -> Tensor:
        """Returns the attention [1, P, H, D]."""
        p = packing.num_shared
        # [B, _, L, D]
        own = [tensor[0][:, packing.places_BL].transpose(0, 1) for tensor in (query, key, value)]
        shared = [tensor[:, :, :p].expand(len(own[0]), -1, -1, -1) for tensor in (key, value)]
        keys, values = (torch.cat(pair, dim=2) for pair in zip(shared, own[1:], strict=True))
        rows = attention(own[0], keys, values, packing.hidden_LS, scaling)
        ctx.packing, ctx.rows_shape, ctx.first_shape = packing, rows.query_shape, None
        saved, out_PHD = [*rows.saved], rows.out_BTHD[packing.is_own_BL]
        if p:
            is_later = torch.ones(p, p, dtype=torch.bool).triu(1)
            first = attention(query[:, :, :p], key[:, :, :p], value[:, :, :p], is_later, scaling)
            ctx.first_shape = first.query_shape
            saved += first.saved
            out_PHD = torch.cat([first.out_BTHD[0], out_PHD])
        ctx.save_for_backward(*saved)
        ctx.scaling = scaling
        return out_PHD[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1PHD: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of queries, keys and values."""
        packing: Packing = ctx.packing
        p, is_own_BL = packing.num_shared, packing.is_own_BL
        saved = ctx.saved_tensors
        grad_BLHD = grad_1PHD.new_zeros((*is_own_BL.shape, *grad_1PHD.shape[2:]))
        grad_BLHD[is_own_BL] = grad_1PHD[0, p:]
        rows = Attended(grad_BLHD, saved[:4], ctx.rows_shape)
        own = attention_gradients(rows, grad_BLHD, ctx.scaling)
        parts = [own[0], *(gradient[:, :, p:] for gradient in own[1:])]
        packed = [gradient.transpose(1, 2)[is_own_BL] for gradient in parts]  # [P - p, _, D]
        if p:
            first = Attended(grad_1PHD, saved[4:], ctx.first_shape)
            begin = list(attention_gradients(first, grad_1PHD[:, :p], ctx.scaling))
            for i in (1, 2):  # all rows attended to the shared keys and values
                begin[i] = begin[i] + own[i][:, :, :p].sum(dim=0, keepdim=True)
            packed = [
                torch.cat([b[0].transpose(0, 1), r]) for b, r in zip(begin, packed, strict=True)
            ]
        return (*(gradient.transpose(0, 1)[None] for gradient in packed), None, None)
