"""Masks logits so that rows with a grammar can only be given tokens that it allows.

The masks of all rows are computed together. Nothing is computed if no row has a grammar.
"""

# N rows, K rows with a grammar, V vocabulary, W words of a mask
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par
from torch import Tensor

from worker.serve.grammars.constraint import Constraint

# The engine thread waits for the masks, and other threads have work too.
EXECUTOR: Final = LLExecutor(num_threads=1)


@dataclass(frozen=True)
class Masked:
    """Rows whose logits were masked, and their logits before that if they are needed again."""

    rows: list[int]
    before_KV: Tensor | None

    def put_back(self, logits_NV: Tensor) -> None:
        if self.before_KV is not None:
            logits_NV[self.rows] = self.before_KV


def mask_logits(
    logits_NV: Tensor, constraints: Sequence[Constraint | None], *, keeps_logits: bool
) -> Masked | None:
    """Sets the logits of all tokens that a grammar does not allow to minus infinity, in place.

    Sets `fault` of the constraints whose matcher has failed. Returns None if no row has a grammar.
    """
    constrained = [(row, c) for row, c in enumerate(constraints) if c is not None]
    if not constrained:
        return None
    rows = [row for row, _ in constrained]
    before_KV = logits_NV[rows] if keeps_logits else None
    bits_KW = np.zeros(
        (len(rows), max(c.vocabulary.num_mask_words for _, c in constrained)), dtype=np.int32
    )
    fill_next_token_bitmask_par(
        EXECUTOR, [(c.matcher, index) for index, (_, c) in enumerate(constrained)], bits_KW
    )
    for index, (row, constraint) in enumerate(constrained):
        constraint.poll()
        if constraint.fault is None and constraint.is_over:
            _allow_ends(logits_NV[row], constraint)
        else:
            _mask_row(logits_NV[row], bits_KW[index], constraint)
    return Masked(rows, before_KV)


def _mask_row(
    logits_V: Tensor, bits_W: "np.ndarray[tuple[int], np.dtype[np.int32]]", constraint: Constraint
) -> None:
    vocabulary = constraint.vocabulary
    begin = vocabulary.num_words if constraint.is_first else 0
    words = bits_W[begin : begin + vocabulary.num_words]
    banned = np.unpackbits(~words.view(np.uint8), bitorder="little")[: len(logits_V)]
    banned_V = torch.from_numpy(banned).view(torch.bool).to(logits_V.device)
    logits_V.masked_fill_(banned_V, -torch.inf)


def _allow_ends(logits_V: Tensor, constraint: Constraint) -> None:
    """Leaves only end tokens, even those that `min_tokens` has just banned."""
    logits_V.fill_(-torch.inf)
    logits_V[sorted(constraint.vocabulary.end_ids)] = 0.0
