"""What all rows of a teacher begin with, computed once: chats share a system prompt and a template's first words.

T tokens, H hidden width.
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

LEAST_TOKENS = 8  # fewer save less than the cache costs


def shared_prefix(examples: Sequence[Example]) -> tuple[int, ...]:
    """The tokens that all rows begin with, up to the first position where one predicts a target; () if they are few.

    What an encoder reads is no prefix: it looks both ways.
    """
    if len(examples) < 2 or any(example.source_ids for example in examples):
        return ()
    rows = [example.token_ids for example in examples]
    first, last = min(rows), max(rows)  # what these two begin with, all between them do
    shared = tuple(
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    )
    first_kept = min(min(kept_positions(example)) for example in examples)
    shared = shared[: min(first_kept, min(map(len, rows)) - 2)]
    return shared if len(shared) >= LEAST_TOKENS else ()


class Prefix:
    """The keys and values of a causal model behind some tokens."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self._body = decoder_of(model)
        self._config = model.config
        cache = self._body(input_ids=torch.tensor([tokens]), use_cache=True).past_key_values
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]

    def begins(self, example: Example) -> bool:
        """Whether the row begins with it, and predicts nothing before its end."""
        num = len(self.tokens)
        return example.token_ids[:num] == self.tokens and min(kept_positions(example)) >= num

    @torch.no_grad()
    def states(self, example: Example) -> Tensor:
        """The last states of a row that begins with it, where it predicts targets, [T, H]."""
        cache = DynamicCache(config=self._config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        num = len(self.tokens)
        ids_1T = torch.tensor([model_input(example)[num:]])
        states_TH: Tensor = self._body(input_ids=ids_1T, cache=cache).last_hidden_state[0]
        return states_TH[[position - num for position in kept_positions(example)]]
