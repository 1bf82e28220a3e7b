"""Decode step whose tensors keep their addresses, so that a CUDA graph can replay it.

A graph repeats kernels with the same addresses, shapes and numbers. In a plain decode step they
change: its window ends at the cursor. The window of a static step begins at column 0 and has one of
a few widths. Columns after the cursor are masked. The batch is padded to one of a few numbers of
rows. All that differs between two steps of one shape is in `inputs_I`, including the cursor.

Padding rows use rows of the cache that no sequence has. They attend to the cursor's column only,
because a row in which all columns are masked would become NaN.
"""

# N rows, P rows with padding, W columns of the window, S source tokens, V vocabulary, I numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from worker.host_copies import copy_into
from worker.serve.cuda_graphs import GraphCache
from worker.serve.decoding.encoder_cache import EncoderCache
from worker.serve.decoding.families import Call, Family
from worker.serve.decoding.kv_cache import WindowedCache

LEAST_COLUMNS = 64
LEAST_ROW_STEP = 8
NUM_INPUTS = 4  # numbers per row: token, position, start, and length of the source


class Shape(NamedTuple):
    """Shape of a static step: rows with padding, columns, and source tokens of an encoder."""

    num_rows: int
    num_columns: int
    num_source: int = 0


class StaticStep:
    """Decode steps of one batch. With `graphs`, they are recorded and replayed.

    `round_rows` and `round_columns` choose the shape. `logits_PV` has the logits of the newest
    step. The next step overwrites them.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        cache: WindowedCache,
        sources: EncoderCache | None,
        graphs: GraphCache | None,
    ) -> None:
        self.model, self.family = model, family
        self.cache, self.sources, self.graphs = cache, sources, graphs
        self.round_rows: Callable[[int], int] = rounded_rows
        self.round_columns: Callable[[int], int] = rounded_columns
        device = next(model.parameters()).device
        self.inputs_I = torch.zeros(
            1 + NUM_INPUTS * cache.max_rows, dtype=torch.int64, device=device
        )
        self.logits_PV: Tensor | None = None
        self._versions: list[int] = []

    @property
    def is_off(self) -> bool:
        """True if graphs cannot be recorded. Plain steps are faster then."""
        return self.graphs is not None and self.graphs.is_off

    @property
    def num_bytes(self) -> int:
        logits = 0 if self.logits_PV is None else self.logits_PV.nbytes
        return logits + (0 if self.graphs is None else self.graphs.num_bytes)

    @property
    def reserved_bytes(self) -> int:
        """Memory that the KV cache must leave free."""
        return 0 if self.graphs is None else self.graphs.reserved_bytes

    def clear(self) -> None:
        """Frees the graphs and the logits."""
        self.logits_PV = None
        if self.graphs is not None:
            self.graphs.clear()

    def run(
        self, tokens: Sequence[int], positions_N1: Tensor, starts: Sequence[int], cursor: int
    ) -> Tensor:
        """Writes one column of every row. Returns the next-token logits [N, V], float32."""
        versions = [cache.version for cache in self._caches()]
        if versions != self._versions:
            self.clear()
            self._versions = versions
        shape = self.shape_of(len(tokens), cursor)
        self.fill(shape, tokens, positions_N1, starts, cursor)
        if self.graphs is None:
            self.compute(shape)
        else:
            self.graphs.run(shape, partial(self.compute, shape))
        assert self.logits_PV is not None, "the step has computed them"
        return self.logits_PV[: len(tokens)]

    def shape_of(self, num_rows: int, cursor: int) -> Shape:
        most_rows = min(cache.window.num_rows for cache in self._caches())
        num_columns = min(self.round_columns(cursor + 1), self.cache.window.width)
        num_source = 0
        if self.sources is not None:
            longest = self.round_columns(max(self.sources.lengths))
            num_source = min(longest, self.sources.cache.window.width)
        return Shape(min(self.round_rows(num_rows), most_rows), num_columns, num_source)

    def fill(
        self,
        shape: Shape,
        tokens: Sequence[int],
        positions_N1: Tensor,
        starts: Sequence[int],
        cursor: int,
    ) -> None:
        """Copies the inputs of a step to the device. The host does not wait."""
        num_padding = shape.num_rows - len(tokens)
        lengths = [1] * len(tokens) if self.sources is None else self.sources.lengths
        parts = ((tokens, 0), (positions_N1[:, 0].tolist(), 0), (starts, cursor), (lengths, 1))
        numbers = [cursor]
        for part, filler in parts:
            numbers += [*part, *[filler] * num_padding]
        copy_into(self.inputs_I[: len(numbers)], torch.tensor(numbers))

    def compute(self, shape: Shape) -> None:
        """Computes the logits from the inputs. A graph records this function."""
        P = shape.num_rows
        tokens_P, positions_P, starts_P, lengths_P = (
            self.inputs_I[1 + part * P : 1 + (part + 1) * P] for part in range(NUM_INPUTS)
        )
        self.cache.window.open_static(P, end=shape.num_columns, column_1=self.inputs_I[:1])
        columns_W = torch.arange(shape.num_columns, device=self.inputs_I.device)
        mask_PW = (columns_W >= starts_P[:, None]).long()  # the model hides those after the cursor
        call = Call(tokens_P[:, None], mask_PW, positions_P[:, None], self.cache)
        if self.sources is not None:
            call = self.sources.shown_static(call, P, shape.num_source, lengths_P)
        logits_PV = self.family.forward(self.model, call)
        if self.logits_PV is None:  # never while a graph records: it has been warmed up before
            most_rows = min(cache.window.num_rows for cache in self._caches())
            size = (most_rows, logits_PV.shape[1])
            self.logits_PV = torch.empty(size, dtype=torch.float32, device=logits_PV.device)
        self.logits_PV[:P].copy_(logits_PV)

    def _caches(self) -> list[WindowedCache]:
        return [self.cache] if self.sources is None else [self.cache, self.sources.cache]


def rounded_rows(num_rows: int) -> int:
    """Returns a power of two up to 8 rows, and then one of at most four numbers per doubling."""
    if num_rows <= LEAST_ROW_STEP:
        return 1 << (num_rows - 1).bit_length()
    return _rounded(num_rows, LEAST_ROW_STEP)


def rounded_columns(num_columns: int) -> int:
    """Returns a multiple of 64: one of at most four numbers per doubling."""
    return _rounded(num_columns, LEAST_COLUMNS)


def _rounded(number: int, least_step: int) -> int:
    step = max(least_step, 1 << max(0, (number - 1).bit_length() - 3))
    return -(-number // step) * step
