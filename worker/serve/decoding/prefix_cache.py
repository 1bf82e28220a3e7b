"""Prefix cache: keys and values of recent prompts, for prompts that begin with the same tokens.

Chat templates and system prompts give most prompts of a model the same beginning. The keys and
values of a token in a decoder depend only on that token and those before it. They may therefore be
copied from one row to another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from worker.serve.decoding.kv_cache import WindowedCache

# A prompt with fewer tokens after its cached prefix is not added to the cache.
LEAST_NEW_TOKENS = 16


@dataclass(eq=False)
class Prefix:
    """A prompt with the keys and values of each layer, [heads, tokens, dim]."""

    tokens: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]

    def num_shared(self, prompt: Sequence[int]) -> int:
        """Returns the length of the common prefix."""
        return sum(
            1
            for _ in takewhile(
                lambda pair: pair[0] == pair[1], zip(self.tokens, prompt, strict=False)
            )
        )


class Prefixes:
    """Cached prompts in the order of their last use, the most recent one at the end.

    Their total length is at most `max_tokens`.
    """

    def __init__(self, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._kept: list[Prefix] = []
        self._token_bytes = 0  # of the keys and values of one token

    @property
    def num_bytes(self) -> int:
        return self._token_bytes * sum(len(prefix.tokens) for prefix in self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def find(self, prompt: Sequence[int]) -> tuple[Prefix | None, int]:
        """Returns the cached prompt with the longest common prefix, and the length of that prefix.

        The length is less than that of `prompt`, because the model must read at least one token.
        """
        shared = {index: prefix.num_shared(prompt) for index, prefix in enumerate(self._kept)}
        best = max(shared, key=lambda index: (shared[index], index), default=None)
        if best is None or not shared[best]:
            return None, 0
        return self._kept[best], min(shared[best], len(prompt) - 1)

    def keep(self, prompt: Sequence[int], cache: WindowedCache, row: int, columns: slice) -> None:
        """Copies a prompt that was just prefilled from the KV cache, if enough of it is new."""
        known, num_known = self.find(prompt)
        if known is not None:
            self._kept.remove(known)
            self._kept.append(known)
        if len(prompt) - num_known < LEAST_NEW_TOKENS or len(prompt) > self.max_tokens:
            return
        if known is not None and num_known == len(known.tokens):
            self._kept.remove(known)  # the new prompt contains all of it
        layers = cache.copy_of(row, columns)
        num_bytes = sum(keys.nbytes + values.nbytes for keys, values in layers)
        self._token_bytes = num_bytes // len(prompt)
        self._kept.append(Prefix(tuple(prompt), layers))
        while sum(len(prefix.tokens) for prefix in self._kept) > self.max_tokens:
            self._kept.pop(0)
