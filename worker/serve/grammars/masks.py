"""Masks logits so that rows with a grammar can only be given tokens that it allows.

The masks of all rows are computed together. Those of rows that already have a token are computed
while the model computes their logits. Nothing is computed if no row has a grammar.
"""

# N rows, K rows with a grammar, V vocabulary, W words of a mask
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par
from torch import Tensor

from worker.host_copies import to_device
from worker.serve.grammars.constraint import Constraint, NextMask, Words

# A forward pass waits for the slowest core, so two half-busy cores delay it less than one busy core.
EXECUTOR: Final = LLExecutor(num_threads=2)
OTHER_THREAD: Final = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")


@dataclass(frozen=True)
class Masked:
    """Rows whose logits were masked, and their logits before that if they are needed again."""

    rows_K: Tensor
    before_KV: Tensor | None

    def put_back(self, logits_NV: Tensor) -> None:
        if self.before_KV is not None:
            logits_NV[self.rows_K] = self.before_KV


def mask_logits(
    logits_NV: Tensor, constraints: Sequence[Constraint | None], *, keeps_logits: bool
) -> Masked | None:
    """Sets the logits of all tokens that a grammar does not allow to minus infinity, in place.

    Sets `fault` of the constraints whose matcher has failed. Returns None if no row has a grammar.
    """
    constrained = [(row, c) for row, c in enumerate(constraints) if c is not None]
    if not constrained:
        return None
    rows_K = to_device(torch.tensor([row for row, _ in constrained]), logits_NV.device)
    before_KV = logits_NV[rows_K] if keeps_logits else None
    _begin([c for _, c in constrained if c.next_mask is None])
    open_rows, masks = [], []
    for row, constraint in constrained:
        bits_W = constraint.take_mask()
        constraint.poll()
        if constraint.fault is None and constraint.is_over:
            _allow_ends(logits_NV[row], constraint)
        else:
            open_rows.append(row)
            masks.append(_words(bits_W, constraint))
    if open_rows:
        _ban(logits_NV, open_rows, np.stack(masks))
    return Masked(rows_K, before_KV)


def compute_ahead(constraints: Sequence[Constraint]) -> None:
    """Starts to compute the next masks on another thread, while the model computes the logits."""
    _begin(constraints, OTHER_THREAD)


def _begin(constraints: Sequence[Constraint], pool: ThreadPoolExecutor | None = None) -> None:
    """Sets the next masks of the constraints. Without a pool they are complete at once."""
    if not constraints:
        return
    num_words = max(constraint.vocabulary.num_mask_words for constraint in constraints)
    bits_KW = np.zeros((len(constraints), num_words), dtype=np.int32)
    jobs = [(constraint.matcher, index) for index, constraint in enumerate(constraints)]
    done = None
    if pool is None:
        fill_next_token_bitmask_par(EXECUTOR, jobs, bits_KW)
    else:
        done = pool.submit(fill_next_token_bitmask_par, EXECUTOR, jobs, bits_KW)
    for constraint, bits_W in zip(constraints, bits_KW, strict=True):
        constraint.next_mask = NextMask(bits_W, done)


def _words(bits_W: Words, constraint: Constraint) -> Words:
    """Returns the part of a mask that belongs to the tokens of this place in the text."""
    vocabulary = constraint.vocabulary
    begin = vocabulary.num_words if constraint.is_first else 0
    return bits_W[begin : begin + vocabulary.num_words]


def _ban(logits_NV: Tensor, rows: list[int], words_KW: Words) -> None:
    """Sets the logits of the rows to minus infinity where the mask has a zero.

    One operation for all rows is several times faster than one per row.
    """
    num_logits = logits_NV.shape[1]
    bits_KV = np.unpackbits(~words_KW.view(np.uint8), axis=1, bitorder="little")[:, :num_logits]
    banned_KV = to_device(torch.from_numpy(bits_KV).view(torch.bool), logits_NV.device)
    if len(rows) == len(logits_NV):
        logits_NV.masked_fill_(banned_KV, -torch.inf)
    else:
        rows_K = to_device(torch.tensor(rows), logits_NV.device)
        logits_NV[rows_K] = logits_NV[rows_K].masked_fill_(banned_KV, -torch.inf)


def _allow_ends(logits_V: Tensor, constraint: Constraint) -> None:
    """Leaves only end tokens, even those that `min_tokens` has just banned."""
    logits_V.fill_(-torch.inf)
    ends = torch.tensor(sorted(constraint.vocabulary.end_ids), dtype=torch.int64)
    logits_V.index_fill_(0, to_device(ends, logits_V.device), 0.0)
