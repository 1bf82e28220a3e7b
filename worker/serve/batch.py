"""The shared-cursor batch: all running rows write their next key and value in one common column.

A newcomer's prompt of n tokens is laid at columns [cursor - n, cursor) of its own row, so joining copies
nothing of the others. One integer a row, its start, gives mask (column >= start) and position
(column - start). When the cursor reaches the width everything slides left; a prompt longer than the
cursor slides everyone right. Leaving moves the last row into the hole.
"""

# N rows, K newcomers, Q tokens a row in this call, W columns of the window, V vocabulary
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from worker.serve.families import Family, family_of

FIRST_WIDTH = 256
FIRST_ROWS = 4


@dataclass
class Window:
    """Which rows and columns the forward call in progress reads and writes."""

    rows: slice
    low: int
    column: int
    num_rows: int
    width: int


class CursorLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one layer, [rows, heads, width, dim], written at the window's column."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._room_for(key_states), self._room_for(value_states)
        self.is_initialized = True

    def _room_for(self, like: Tensor) -> Tensor:
        # zeros: a masked column still takes part as 0 * value, and uninitialised memory may hold NaN
        shape = (self.window.num_rows, like.shape[1], self.window.width, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        w, end = self.window, self.window.column + key_states.shape[2]
        self.keys[w.rows, :, w.column : end] = key_states
        self.values[w.rows, :, w.column : end] = value_states
        return self.keys[w.rows, :, w.low : end], self.values[w.rows, :, w.low : end]

    def get_seq_length(self) -> int:
        return self.window.column - self.window.low

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def resize(self) -> None:
        """Takes the window's num_rows and width, keeping what fits."""
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = self._room_for(old)
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def copy_row(self, source: int, target: int, columns: slice) -> None:
        for buffer in (self.keys, self.values):
            buffer[target, :, columns] = buffer[source, :, columns]

    def move_columns(self, num_rows: int, columns: slice, by: int) -> None:
        moved = slice(columns.start + by, columns.stop + by)
        for buffer in (self.keys, self.values):
            buffer[:num_rows, :, moved] = buffer[:num_rows, :, columns].clone()

    def wipe_row(self, row: int) -> None:
        self.keys[row].zero_()
        self.values[row].zero_()


class CursorBatch:
    """Rows of one causal model in step. Row numbers are 0 … num_rows - 1; `leave` renumbers the last one."""

    def __init__(self, model: nn.Module, *, max_rows: int, max_width: int) -> None:
        self.model = model
        self.family: Family = family_of(model)
        self.device = next(model.parameters()).device
        self.max_rows = max_rows
        self.max_width = max_width
        self.cursor = 0
        self.starts: list[int] = []
        self._forget()

    def _forget(self) -> None:
        rows, width = min(FIRST_ROWS, self.max_rows), min(FIRST_WIDTH, self.max_width)
        self.window = Window(slice(0, 0), low=0, column=0, num_rows=rows, width=width)
        self.cache = Cache(layer_class_to_replicate=partial(CursorLayer, self.window))

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    @property
    def low(self) -> int:
        return min(self.starts, default=self.cursor)

    @torch.no_grad()
    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prefills prompts as new rows at the end; gives each one's next-token logits [K, V], float32."""
        if self.family.can_pad_prompts:
            return self._join(prompts)
        return torch.cat([self._join([prompt]) for prompt in prompts])

    def _join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        longest = max(len(prompt) for prompt in prompts)
        self._reserve(self.num_rows + len(prompts), longest)
        if longest > self.cursor:
            self._slide(longest - self.cursor)
        first_row, column = self.num_rows, self.cursor - longest
        self.starts += [self.cursor - len(prompt) for prompt in prompts]
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        return self._forward(torch.tensor(padded), first_row, low=column, column=column)

    def fork(self, row: int) -> int:
        """A new last row with the same past as `row`."""
        self._reserve(self.num_rows + 1, self.cursor)
        self._copy_row(row, self.num_rows)
        self.starts.append(self.starts[row])
        return self.num_rows - 1

    @torch.no_grad()
    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Appends one token to every row; gives the next-token logits [N, V], float32."""
        if self.cursor == self.window.width:
            self._make_room()
        logits_NV = self._forward(torch.tensor(tokens)[:, None], 0, low=self.low, column=self.cursor)
        self.cursor += 1
        return logits_NV

    def leave(self, row: int, *, is_poisoned: bool = False) -> None:
        """Frees a row; the last row takes its number. A poisoned row's NaNs are wiped, or they would spread."""
        last = self.num_rows - 1
        if is_poisoned:
            for layer in self.cache.layers:
                layer.wipe_row(row)
        if row != last:
            self._copy_row(last, row)
            self.starts[row] = self.starts[last]
        self.starts.pop()
        if not self.starts:
            self.cursor = 0
            if self.window.width > FIRST_WIDTH or self.window.num_rows > FIRST_ROWS:
                self._forget()

    def _copy_row(self, source: int, target: int) -> None:
        for layer in self.cache.layers:
            layer.copy_row(source, target, slice(self.starts[source], self.cursor))

    def _make_room(self) -> None:
        is_worth_sliding = self.low >= self.window.width // 4 or self.window.width == self.max_width
        if self.low and is_worth_sliding:
            self._slide(-self.low)
        else:
            self._reserve(self.num_rows, self.window.width + 1)

    def _slide(self, by: int) -> None:
        if self.starts:
            for layer in self.cache.layers:
                layer.move_columns(self.num_rows, slice(self.low, self.cursor), by)
        self.starts = [start + by for start in self.starts]
        self.cursor += by

    def _reserve(self, num_rows: int, width: int) -> None:
        assert num_rows <= self.max_rows, "admission let in too many rows"
        assert width <= self.max_width, "admission let in a sequence longer than the batch is wide"
        w = self.window
        if num_rows <= w.num_rows and width <= w.width:
            return
        if num_rows > w.num_rows:
            w.num_rows = min(self.max_rows, max(num_rows, 2 * w.num_rows))
        if width > w.width:
            w.width = min(self.max_width, max(width, 2 * w.width))
        for layer in self.cache.layers:
            layer.resize()

    def _forward(self, tokens_NQ: Tensor, first_row: int, *, low: int, column: int) -> Tensor:
        num_rows, num_tokens = tokens_NQ.shape
        self.window.rows = slice(first_row, first_row + num_rows)
        self.window.low, self.window.column = low, column
        starts_N1 = torch.tensor(self.starts[self.window.rows])[:, None]
        columns_W = torch.arange(low, column + num_tokens)
        inputs = {
            "input_ids": tokens_NQ.to(self.device),
            "attention_mask": self._mask(columns_W, starts_N1).to(self.device),
        }
        if self.family.takes_positions:
            inputs["position_ids"] = self._positions(columns_W[-num_tokens:], starts_N1).to(self.device)
        logits_N1V: Tensor = self.model(
            **inputs, cache=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits_N1V[:, -1].float()

    def _mask(self, columns_W: Tensor, starts_N1: Tensor) -> Tensor:
        return (columns_W >= starts_N1).long()

    def _positions(self, columns_Q: Tensor, starts_N1: Tensor) -> Tensor:
        return (columns_Q - starts_N1).clamp(min=0)
