"""Computes the beginning that all of a teacher's rows share once, instead of once per row.

Chats often share a system prompt and the first words of a template.

T tokens, H hidden size.
"""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from worker.distill.data.batching import kept_positions, model_input
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import decoder_of

LEAST_TOKENS = 8  # a shorter prefix saves less than the cache costs


def shared_prefix(examples: Sequence[Example]) -> tuple[int, ...]:
    """Returns the tokens that all rows begin with, or () if they are few.

    The prefix ends before the first position that predicts a target. Rows with an encoder have no
    prefix, because an encoder reads in both directions.
    """
    if len(examples) < 2 or any(example.source_ids for example in examples):
        return ()
    rows = [example.token_ids for example in examples]
    first, last = min(rows), max(rows)  # in sorted order, so a prefix of both is one of all
    shared = tuple(
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    )
    first_kept = min(min(kept_positions(example)) for example in examples)
    shared = shared[: min(first_kept, min(map(len, rows)) - 2)]
    return shared if len(shared) >= LEAST_TOKENS else ()


class Prefix:
    """Keys and values of a causal model for the tokens that rows begin with."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self._body = decoder_of(model)
        self._config = model.config
        cache = self._body(input_ids=torch.tensor([tokens]), use_cache=True).past_key_values
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]

    def begins(self, example: Example) -> bool:
        """Returns whether the row begins with the prefix and predicts no target within it."""
        num = len(self.tokens)
        return example.token_ids[:num] == self.tokens and min(kept_positions(example)) >= num

    @torch.no_grad()
    def states(self, example: Example) -> Tensor:
        """Returns the last states at the positions that predict targets, [T, H].

        The row must begin with the prefix.
        """
        cache = DynamicCache(config=self._config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        num = len(self.tokens)
        ids_1T = torch.tensor([model_input(example)[num:]])
        states_TH: Tensor = self._body(input_ids=ids_1T, cache=cache).last_hidden_state[0]
        return states_TH[[position - num for position in kept_positions(example)]]
