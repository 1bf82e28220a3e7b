"""Batch in which all rows write their next key and value to the same column, the cursor.

The keys and values of a prompt of n tokens are written to columns [cursor - n, cursor) of its row.
The other rows are not copied, unless the prompt is longer than the cursor. One number per row, its start, gives the mask (column >= start) and
the positions (column - start). When the cursor reaches the width of the cache, all rows slide left
or the cache grows. If a prompt is longer than the cursor, all rows slide right. When a row leaves,
the last row takes its place.

A row of an encoder-decoder begins with the start token only. Its prompt is encoded once. The keys
and values of the encoder's output are in a separate cache, at columns [0, n).

On a CUDA device, long prompts are read in chunks that fit the free memory, and decode steps are
static steps, which CUDA graphs replay.
"""

# N rows, K new rows, Q tokens per row in this call, W columns of the window, S source tokens,
# H hidden size, V vocabulary
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from worker.host_copies import to_device
from worker.serve.cuda_graphs import CudaRecorder, GraphCache
from worker.serve.decoding.encoder_cache import EncoderCache
from worker.serve.decoding.families import Call, Family, family_of
from worker.serve.decoding.kv_cache import WindowedCache
from worker.serve.decoding.prefix_cache import Prefixes
from worker.serve.decoding.static_step import StaticStep
from worker.serve.device_memory import PrefillMemory

# On a CUDA device, windows with past columns have a multiple of so many columns where possible.
# Fused kernels need aligned masks, and the allocator reuses memory of equal shapes.
COLUMN_BUCKET = 64
LOGIT_BYTES = 32 * 2**20  # of the logits of one forward pass of `join_scored`
# How decode steps run. `auto` is `graphs` on a CUDA device and `plain` elsewhere. `static` steps
# are those that graphs replay, without graphs.
Steps = Literal["auto", "plain", "static", "graphs"]


class CursorBatch:
    """Rows of one model that are decoded together.

    Rows are numbered 0 … num_rows - 1. `leave` renumbers the last one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_rows: int,
        max_width: int,
        max_source_width: int = 0,
        steps: Steps = "auto",
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        if steps == "auto":
            steps = "plain" if self.device.type == "cpu" else "graphs"
        # the kernels for CPUs take addresses and numbers of the host
        self.family: Family = family_of(model, has_kernels=steps == "plain")
        self.max_rows = max_rows
        self.max_width = max_width
        self.column_bucket = 1 if self.device.type == "cpu" else COLUMN_BUCKET
        self.cursor = 0
        self.starts: list[int] = []
        self.cache = WindowedCache(
            max_rows=max_rows, max_width=max_width, dtype=self.family.cache_dtype
        )
        self.prefixes = Prefixes(max_tokens=max_width)
        self.sources: EncoderCache | None = None
        if self.family.has_encoder:
            self.sources = EncoderCache(self.cache, max_rows=max_rows, max_width=max_source_width)
        self.prefill_memory = None if self.device.type == "cpu" else PrefillMemory.of(model)
        self.static: StaticStep | None = None
        if steps != "plain":
            graphs = GraphCache(CudaRecorder()) if steps == "graphs" else None
            self.static = StaticStep(model, self.family, self.cache, self.sources, graphs)
            for cache in self._caches():
                cache.is_static = True

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    @property
    def low(self) -> int:
        """First column that any row uses."""
        return min(self.starts, default=self.cursor)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, of the encoder's cache, of the prefix cache and of graphs."""
        graphs = 0 if self.static is None else self.static.num_bytes
        return self.prefixes.num_bytes + graphs + sum(cache.num_bytes for cache in self._caches())

    @property
    def reserved_bytes(self) -> int:
        """Bytes that rows must leave free for CUDA graphs."""
        return 0 if self.static is None else self.static.reserved_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the caches at their present width; 0 before the first prefill."""
        return sum(cache.row_bytes for cache in self._caches())

    def _caches(self) -> list[WindowedCache]:
        return [self.cache] if self.sources is None else [self.cache, self.sources.cache]

    def limit_rows(self, num_rows: int) -> None:
        """Sets how many rows the caches may reserve ahead."""
        for cache in self._caches():
            cache.most_ahead = num_rows

    def truncate(self, num_rows: int) -> bool:
        """Removes the rows after the first `num_rows`, also those whose prefill has failed.

        Also clears the prefix cache. Returns whether the remaining rows are intact.
        """
        del self.starts[num_rows:]
        if self.sources is not None:
            self.sources.truncate(num_rows)
        self.prefixes.clear()
        is_intact = not any(cache.is_damaged for cache in self._caches())
        for cache in self._caches():
            cache.is_damaged = False
        if not self.starts:
            self.free()
        return is_intact

    def free(self) -> None:
        """Frees the caches of a batch without rows."""
        assert not self.starts, "rows need their keys and values"
        self.cursor = 0
        self.prefixes.clear()
        for cache in self._caches():
            cache.free()
        if self.static is not None:
            self.static.clear()

    def prefill_tokens(self, num_columns: int) -> int | None:
        """Returns how many tokens of rows with so many columns one forward pass may read.

        None means that memory does not limit them.
        """
        return None if self.prefill_memory is None else self.prefill_memory.num_tokens(num_columns)

    def num_to_read(self, prompt: Sequence[int]) -> int:
        """Returns how many tokens of a prompt the model must read when it joins.

        Tokens in the prefix cache are not read again. An encoder reads all tokens.
        """
        return len(prompt) - self.prefixes.find(prompt)[1]

    @torch.no_grad()
    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prefills prompts as new last rows. Returns their next-token logits [K, V], float32."""
        if self.sources is not None:
            return self._join_encoded(prompts, self.sources)
        if self.family.can_pad_prompts:
            return self._join(prompts)
        return torch.cat([self._join([prompt]) for prompt in prompts])

    @torch.no_grad()
    def join_scored(
        self, prompts: Sequence[Sequence[int]], add: Callable[[int, Tensor], None]
    ) -> Tensor:
        """Like `join`, and also computes the logits after every prompt token. Only for decoders.

        The prompts are padded on the left. They are read in chunks that bound the memory of the
        logits. `add` is called with the first column of each chunk and its logits [K, Q, V].
        """
        assert self.sources is None, "the engine refuses scores of an encoder's prompt"
        assert self.family.can_pad_prompts or len(prompts) == 1, "the caller joins them one by one"
        num_rows, longest = len(prompts), max(len(prompt) for prompt in prompts)
        self._make_room_for_prompts(num_rows, longest)
        first_row, low = self.num_rows, self.cursor - longest
        self.starts += [self.cursor - len(prompt) for prompt in prompts]
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        tokens_KW = torch.tensor(padded)
        config: Any = self.model.config  # transformers is untyped here
        num_columns = max(1, LOGIT_BYTES // (4 * num_rows * config.get_text_config().vocab_size))
        for begin in range(0, longest, num_columns):
            tokens_KQ = tokens_KW[:, begin : begin + num_columns]
            logits = self._forward(
                tokens_KQ, first_row, low=low, column=low + begin, num_logits=tokens_KQ.shape[1]
            )
            logits_KQV = logits.reshape(*tokens_KQ.shape, -1)
            add(begin, logits_KQV)
        for row, prompt in enumerate(prompts, first_row):
            self.prefixes.keep(prompt, self.cache, row, slice(self.starts[row], self.cursor))
        return logits_KQV[:, -1].clone()

    def _join_encoded(self, prompts: Sequence[Sequence[int]], sources: EncoderCache) -> Tensor:
        tokens_KS, mask_KS = sources.add(prompts)
        states_KSH = self.family.encode(
            self.model, to_device(tokens_KS, self.device), to_device(mask_KS, self.device)
        )
        return self._join([[self.family.start_token]] * len(prompts), states_KSH)

    def _join(self, prompts: Sequence[Sequence[int]], states_KSH: Tensor | None = None) -> Tensor:
        longest = max(len(prompt) for prompt in prompts)
        self._make_room_for_prompts(len(prompts), longest)
        first_row, known = self.num_rows, [self.prefixes.find(prompt) for prompt in prompts]
        self.starts += [self.cursor - len(prompt) for prompt in prompts]
        num_read = max(len(prompt) - num for prompt, (_, num) in zip(prompts, known, strict=True))
        for row, (prompt, (prefix, _)) in enumerate(zip(prompts, known, strict=True), first_row):
            if prefix is not None and len(prompt) > num_read:
                self.cache.write(row, self.starts[row], prefix.layers, len(prompt) - num_read)
        # All rows read the same number of tokens, which end at the cursor. A row with a longer
        # cached prefix reads a part of it again.
        padded = [[0] * (num_read - len(prompt)) + list(prompt[-num_read:]) for prompt in prompts]
        low, column = self.cursor - longest, self.cursor - num_read
        num_tokens = self.prefill_tokens(longest) or num_read * len(prompts)
        for tokens_KQ in torch.split(torch.tensor(padded), max(1, num_tokens // len(prompts)), 1):
            logits = self._forward(
                tokens_KQ, first_row, low=low, column=column, states_KSH=states_KSH
            )
            column += tokens_KQ.shape[1]
        if self.sources is None:
            for row, prompt in enumerate(prompts, first_row):
                self.prefixes.keep(prompt, self.cache, row, slice(self.starts[row], self.cursor))
        return logits

    def fork(self, row: int) -> int:
        """Appends a copy of a row, with the same past, and returns its number."""
        self.cache.reserve(self.num_rows + 1, self.cursor)
        self._copy_row(row, self.num_rows)
        self.starts.append(self.starts[row])
        if self.sources is not None:
            self.sources.fork(row)
        return self.num_rows - 1

    @torch.no_grad()
    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Appends one token to every row. Returns the next-token logits [N, V], float32."""
        if self.cursor == self.cache.window.width:
            self._make_room()
        if self.static is None or self.static.is_off:
            logits_NV = self._forward(
                torch.tensor(tokens)[:, None], 0, low=self.low, column=self.cursor
            )
        else:
            logits_NV = self._static_step(self.static, tokens)
        self.cursor += 1
        return logits_NV

    def _static_step(self, static: StaticStep, tokens: Sequence[int]) -> Tensor:
        """Returns the logits of a static step. Its window begins at column 0.

        If a window of half the width would do, the rows slide left first.
        """
        num_columns = static.round_columns(self.cursor + 1 - self.low)
        if self.low and 2 * num_columns <= static.round_columns(self.cursor + 1):
            self._slide(-self.low)
        starts_N1 = torch.tensor(self.starts)[:, None]
        positions_N1 = self._positions(torch.tensor([self.cursor]), starts_N1)
        return static.run(tokens, positions_N1, self.starts, self.cursor)

    def leave(self, row: int, *, is_poisoned: bool = False) -> None:
        """Frees a row. The last row takes its number.

        A poisoned row is set to zero. Otherwise its NaNs would reach the next sequence in this row,
        even through masked columns.
        """
        last = self.num_rows - 1
        if is_poisoned:
            self.cache.wipe_row(row)
        if self.sources is not None:
            self.sources.leave(row, is_poisoned=is_poisoned)
        if row != last:
            self._copy_row(last, row)
            self.starts[row] = self.starts[last]
        self.starts.pop()
        if not self.starts:
            self.cursor = 0
            self.cache.shrink()

    def _copy_row(self, source: int, target: int) -> None:
        self.cache.copy_row(source, target, slice(self.starts[source], self.cursor))

    def _make_room_for_prompts(self, num_rows: int, longest: int) -> None:
        """Makes room for new rows and for `longest` tokens before the cursor.

        If the rows slide, unused columns stay before them, so that windows of plain steps can be
        rounded up.
        """
        if longest <= self.cursor:
            self.cache.reserve(self.num_rows + num_rows, longest)
            return
        num_spare = self.column_bucket - 1 if self.static is None else 0
        cursor = min(self.max_width, longest + num_spare)
        self.cache.reserve(self.num_rows + num_rows, cursor)
        self._slide(cursor - self.cursor)

    def _make_room(self) -> None:
        width = self.cache.window.width
        is_worth_sliding = self.low >= width // 4 or width == self.max_width
        if self.low and is_worth_sliding:
            self._slide(-self.low)
        else:
            self.cache.reserve(self.num_rows, width + 1)

    def _slide(self, by: int) -> None:
        if self.starts:
            self.cache.move_columns(self.num_rows, slice(self.low, self.cursor), by)
        self.starts = [start + by for start in self.starts]
        self.cursor += by

    def _forward(
        self,
        tokens_NQ: Tensor,
        first_row: int,
        *,
        low: int,
        column: int,
        states_KSH: Tensor | None = None,
        num_logits: int = 1,
    ) -> Tensor:
        num_rows, num_tokens = tokens_NQ.shape
        rows = slice(first_row, first_row + num_rows)
        end = column + num_tokens
        if low < column:  # a prefill without a past is faster without masked columns
            low = max(0, end - _round_up(end - low, self.column_bucket))
        self.cache.window.open(rows, low=low, column=column, end=end)
        starts_N1 = torch.tensor(self.starts[rows])[:, None]
        columns_W = torch.arange(low, end)
        mask_NW = None
        if self._is_mask_needed(rows, low):
            mask_NW = to_device(self._mask(columns_W, starts_N1), self.device)
        call = Call(
            to_device(tokens_NQ, self.device),
            mask_NW,
            to_device(self._positions(columns_W[-num_tokens:], starts_N1), self.device),
            self.cache,
            num_logits=num_logits,
            starts_N=starts_N1[:, 0],
        )
        if self.sources is not None:
            call = self.sources.shown_to(call, rows, states_KSH)
        return self.family.forward(self.model, call).float()

    def _is_mask_needed(self, rows: slice, low: int) -> bool:
        """Without a mask, PyTorch's fastest attention kernels can be used on a GPU."""
        is_plain = self.sources is None and self.family.can_pad_prompts
        is_open = all(start <= low for start in self.starts[rows])
        return self.device.type == "cpu" or not is_plain or not is_open

    def _mask(self, columns_W: Tensor, starts_N1: Tensor) -> Tensor:
        return (columns_W >= starts_N1).long()

    def _positions(self, columns_Q: Tensor, starts_N1: Tensor) -> Tensor:
        return (columns_Q - starts_N1).clamp(min=0)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
