"""Cross-attention keys and values of the rows of an encoder-decoder."""

# N rows, K new rows, S source tokens, H hidden size
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from worker.host_copies import to_device
from worker.serve.decoding.families import Call
from worker.serve.decoding.kv_cache import WindowedCache


class EncoderCache:
    """Cross-attention keys and values of each row's prompt, computed once when the row joins."""

    def __init__(self, past: WindowedCache, *, max_rows: int, max_width: int) -> None:
        self.cache = WindowedCache(max_rows=max_rows, max_width=max_width)
        self.with_past = EncoderDecoderCache(past, self.cache)
        self.lengths: list[int] = []

    def add(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Adds new rows and returns their tokens and mask [K, S], padded on the right."""
        first_row = len(self.lengths)
        self.lengths += [len(prompt) for prompt in prompts]
        self.cache.reserve(len(self.lengths), max(self.lengths[first_row:]))
        mask_KS = self._mask(slice(first_row, len(self.lengths)))
        padded = [[*prompt, *[0] * (mask_KS.shape[1] - len(prompt))] for prompt in prompts]
        return torch.tensor(padded), mask_KS

    def shown_to(self, call: Call, rows: slice, states_KSH: Tensor | None) -> Call:
        """Returns the call with the encoder output that its rows attend to.

        New rows get `states_KSH`, and the model fills the cache from them. For other rows
        `states_KSH` is None, and the model reads the cache.
        """
        mask_NS = to_device(self._mask(rows), call.tokens_NQ.device)
        self.cache.window.open(rows, low=0, column=0, end=mask_NS.shape[1])
        if states_KSH is None:
            states_KSH = self.cache.layers[0].keys[:, 0, :, :1]  # only the shape and dtype are read
        else:
            self.with_past.is_updated.clear()  # makes the model fill the cache
        return replace(call, cache=self.with_past, states_NSH=states_KSH, source_mask_NS=mask_NS)

    def shown_static(self, call: Call, num_rows: int, num_source: int, lengths_N: Tensor) -> Call:
        """Returns a call of the first rows with their encoder output, for a static step."""
        self.cache.window.open(slice(0, num_rows), low=0, column=0, end=num_source)
        columns_S = torch.arange(num_source, device=lengths_N.device)
        return replace(
            call,
            cache=self.with_past,
            states_NSH=self.cache.layers[0].keys[:, 0, :, :1],  # only the shape and dtype are read
            source_mask_NS=(columns_S < lengths_N[:, None]).long(),
        )

    def fork(self, row: int) -> None:
        self.cache.reserve(len(self.lengths) + 1, self.lengths[row])
        self._copy(row, len(self.lengths))
        self.lengths.append(self.lengths[row])

    def leave(self, row: int, *, is_poisoned: bool) -> None:
        if is_poisoned:
            self.cache.wipe_row(row)
        last = len(self.lengths) - 1
        if row != last:
            self._copy(last, row)
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self.cache.shrink()

    def truncate(self, num_rows: int) -> None:
        """Removes the rows after the first `num_rows`, also those whose prefill has failed."""
        del self.lengths[num_rows:]
        for layer in range(len(self.cache.layers)):
            self.with_past.is_updated[layer] = True  # the other rows read the cache

    def _mask(self, rows: slice) -> Tensor:
        lengths = self.lengths[rows]
        return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()

    def _copy(self, source: int, target: int) -> None:
        self.cache.copy_row(source, target, slice(0, self.lengths[source]))
