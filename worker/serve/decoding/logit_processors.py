"""Logit processors, which apply logit_bias, penalties and min_tokens to the raw logits of a row.

They run before temperature. Only the affected logits are read and written, for all rows at once. A
step in which no row has a processor costs nothing.
"""

# N rows, V vocabulary, K changed logits of all rows, R of one row, C the most for one row
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.contracts.generation import Sampling
from worker.host_copies import to_device
from worker.serve.errors import InvalidLogitBias, InvalidStopTokenIds

# Division by less overflows, and long before that only the best token has any probability.
MIN_REPETITION_PENALTY = 1e-20
NOTHING = (0.0, 1.0, 0.0)  # bias, repetition and penalty without effect
BIAS, REPETITION, PENALTY = range(3)


class LogitsProcessor:
    """Changes to the logits of one row, which depend on the tokens that it has read and written.

    The changes are applied in this order:

    1. `logit_bias` is added. Before `min_tokens`, end tokens get minus infinity instead.
    2. Logits of tokens in the prompt or answer are divided by `repetition_penalty` if positive, and
       multiplied by it otherwise (Keskar et al., arXiv:1909.05858).
    3. For tokens of the answer, `presence_penalty` is subtracted, and `frequency_penalty` times the
       number of occurrences.
    """

    def __init__(
        self, sampling: Sampling, *, context: Sequence[int], end_ids: frozenset[int]
    ) -> None:
        """Creates a processor. `context` holds the tokens that the answer continues."""
        self._sampling = sampling
        self._repetition = max(sampling.repetition_penalty, MIN_REPETITION_PENALTY)
        self._counts: Counter[int] = Counter()
        self._num_tokens = 0
        self._biases = dict(sampling.logit_bias)
        self._banned = end_ids if sampling.min_tokens else frozenset()
        is_repetition_penalised = sampling.repetition_penalty != 1.0
        seen = context if is_repetition_penalised else ()
        touched = list(dict.fromkeys([*self._biases, *self._banned, *seen]))
        self._slots = {token: slot for slot, token in enumerate(touched)}
        is_counting = (
            is_repetition_penalised or sampling.frequency_penalty or sampling.presence_penalty
        )
        self._max_new = sampling.max_tokens if is_counting else 0
        self._tokens_C = torch.tensor(touched + [0] * self._max_new)
        self._changes_3C = torch.tensor(NOTHING)[:, None].repeat(1, len(self._tokens_C))
        self._changes_3C[BIAS, : len(touched)] = torch.tensor(
            [self._bias_of(token) for token in touched]
        )
        self._changes_3C[REPETITION, [self._slots[token] for token in seen]] = self._repetition

    def changes(self) -> tuple[Tensor, Tensor]:
        """Returns the tokens whose logits change now [R], and their changes [3, R].

        The changes of a token are its bias, its repetition penalty and its other penalties.
        """
        num_touched = len(self._slots)
        return self._tokens_C[:num_touched], self._changes_3C[:, :num_touched]

    def record(self, token: int) -> None:
        """Records the next token of the row."""
        self._num_tokens += 1
        if self._num_tokens == self._sampling.min_tokens:
            for end_id in self._banned:
                self._changes_3C[BIAS, self._slots[end_id]] = self._bias_of(end_id)
        if not self._max_new:
            return
        self._counts[token] += 1
        slot = self._slots.setdefault(token, len(self._slots))
        penalty = (
            self._sampling.presence_penalty + self._sampling.frequency_penalty * self._counts[token]
        )
        self._tokens_C[slot] = token
        self._changes_3C[REPETITION, slot] = self._repetition
        self._changes_3C[PENALTY, slot] = penalty

    def _bias_of(self, token: int) -> float:
        is_banned = self._num_tokens < self._sampling.min_tokens and token in self._banned
        return -torch.inf if is_banned else self._biases.get(token, 0.0)


def processor_for(
    sampling: Sampling, *, context: Sequence[int], end_ids: frozenset[int]
) -> LogitsProcessor | None:
    """Returns the processor of one row, or None if the request does not change its logits."""
    has_penalties = sampling.frequency_penalty or sampling.presence_penalty
    is_asked = has_penalties or sampling.repetition_penalty != 1.0 or sampling.logit_bias
    if not is_asked and not (sampling.min_tokens and end_ids):
        return None
    return LogitsProcessor(sampling, context=context, end_ids=end_ids)


def refuse_unknown_tokens(sampling: Sampling, vocab_size: int) -> None:
    """Checks that all tokens that a request names are in the vocabulary.

    Raises InvalidLogitBias or InvalidStopTokenIds.
    """
    biased = [token for token, _ in sampling.logit_bias]
    for error, tokens in (
        (InvalidLogitBias, biased),
        (InvalidStopTokenIds, sampling.stop_token_ids),
    ):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise error(
                    f"token {token} of {error.param} is not in the vocabulary; give tokens from 0 to {vocab_size - 1}"
                )


@dataclass(frozen=True)
class Changed:
    """Positions of the logits that were changed, and their raw values."""

    rows_K: Tensor
    tokens_K: Tensor
    raw_K: Tensor

    def put_back(self, logits_NV: Tensor) -> None:
        logits_NV[self.rows_K, self.tokens_K] = self.raw_K


def process_logits(
    logits_NV: Tensor, processors: Sequence[LogitsProcessor | None]
) -> Changed | None:
    """Changes logits in place, in the rows that have a processor.

    Returns the raw values of the changed logits, or None if no row has a processor.
    """
    asked = [
        (row, *processor.changes())
        for row, processor in enumerate(processors)
        if processor is not None
    ]
    if not asked:
        return None
    rows, tokens, changes = zip(*asked, strict=True)
    sizes = [len(tokens_R) for tokens_R in tokens]
    device = logits_NV.device
    rows_K = torch.tensor(rows).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes))
    rows_K = to_device(rows_K, device)
    tokens_K = to_device(torch.cat(tokens), device)
    bias_K, repetition_K, penalty_K = to_device(torch.cat(changes, dim=1), device)
    raw_K = logits_NV[rows_K, tokens_K]
    biased_K = raw_K + bias_K
    divided_K = torch.where(biased_K > 0, biased_K / repetition_K, biased_K * repetition_K)
    logits_NV[rows_K, tokens_K] = divided_K - penalty_K
    return Changed(rows_K, tokens_K, raw_K)
