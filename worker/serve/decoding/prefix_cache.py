"""Keys and values of prompts read lately, so that a prompt which begins alike is read only from where it differs.

Chat templates and system prompts make most prompts of a model begin alike. What a decoder keeps of a token depends on
the tokens before it and on nothing behind, so it may be copied from one row to another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from worker.serve.decoding.kv_cache import WindowedCache

LEAST_NEW_TOKENS = (
    16  # a prompt that brings fewer is not worth keeping beside the one that it begins like
)


@dataclass(eq=False)
class Prefix:
    """A prompt and the keys and values [heads, tokens, dim] of each layer."""

    tokens: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]

    def num_shared(self, prompt: Sequence[int]) -> int:
        return sum(
            1
            for _ in takewhile(
                lambda pair: pair[0] == pair[1], zip(self.tokens, prompt, strict=False)
            )
        )


class Prefixes:
    """The prompts kept, the one used last at the end; together at most `max_tokens` long."""

    def __init__(self, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._kept: list[Prefix] = []

    def find(self, prompt: Sequence[int]) -> tuple[Prefix | None, int]:
        """The kept prompt that begins most alike, and how many tokens they share: never all of this one."""
        shared = {index: prefix.num_shared(prompt) for index, prefix in enumerate(self._kept)}
        best = max(shared, key=lambda index: (shared[index], index), default=None)
        if best is None or not shared[best]:
            return None, 0
        return self._kept[best], min(shared[best], len(prompt) - 1)

    def keep(self, prompt: Sequence[int], cache: WindowedCache, row: int, columns: slice) -> None:
        """Takes a copy of what the cache holds of a prompt just read, if much of it is new."""
        known, num_known = self.find(prompt)
        if known is not None:
            self._kept.remove(known)
            self._kept.append(known)
        if len(prompt) - num_known < LEAST_NEW_TOKENS or len(prompt) > self.max_tokens:
            return
        if known is not None and num_known == len(known.tokens):
            self._kept.remove(known)  # the longer prompt tells all of it
        self._kept.append(Prefix(tuple(prompt), cache.copy_of(row, columns)))
        while sum(len(prefix.tokens) for prefix in self._kept) > self.max_tokens:
            self._kept.pop(0)
