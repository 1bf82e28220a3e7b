"""Key and value buffers for all rows of a batch, of which each model call uses a window."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_WIDTH = 256
FIRST_ROWS = 4
KEPT_BYTES = 256 * 2**20  # largest buffers that an idle model keeps
STATIC_KEPT_BYTES = 4 * 2**30  # the same with static steps: new buffers would need new graphs


@dataclass
class Window:
    """Rows and columns that the current model call uses.

    The call reads columns [low, end) and writes columns [column, end). In a static step the column
    is a tensor instead, `column_1`, so that a CUDA graph can be replayed for other columns.
    """

    num_rows: int
    width: int
    rows: slice = field(default_factory=lambda: slice(0, 0))
    low: int = 0
    column: int = 0
    end: int = 0
    column_1: Tensor | None = None

    def open(self, rows: slice, *, low: int, column: int, end: int) -> None:
        self.rows, self.low, self.column, self.end = rows, low, column, end
        self.column_1 = None

    def open_static(self, num_rows: int, *, end: int, column_1: Tensor) -> None:
        """Opens the first rows and columns for a call that writes one column of each row."""
        self.rows, self.low, self.end, self.column_1 = slice(0, num_rows), 0, end, column_1


class WindowedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one layer, [rows, heads, width, dim]."""

    def __init__(self, window: Window, dtype: torch.dtype | None) -> None:
        # Does not call the parent's __init__: it would assign keys and values, which are views.
        self.window = window
        self._dtype = dtype
        self.is_initialized = False
        self._buffers: list[Tensor] = []

    @property
    def keys(self) -> Tensor:
        return self._seen(self._buffers[0])

    @property
    def values(self) -> Tensor:
        return self._seen(self._buffers[1])

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def _seen(self, buffer: Tensor) -> Tensor:
        return buffer[self.window.rows, :, self.window.low : self.window.end]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._buffers = [self._room_for(key_states), self._room_for(value_states)]
        self.is_initialized = True

    def _room_for(self, like: Tensor) -> Tensor:
        # Zeros, because uninitialised memory may hold NaN, and 0 * NaN of a masked column is NaN.
        shape = (self.window.num_rows, like.shape[1], self.window.width, like.shape[3])
        return torch.zeros(shape, dtype=self._dtype or like.dtype, device=like.device)

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows of the current call, with all columns."""
        keys, values = (buffer[self.window.rows] for buffer in self._buffers)
        return keys, values

    @property
    def addresses(self) -> tuple[int, int]:
        """Memory addresses of the keys and values of the first row of the current call."""
        keys, values = self._buffers
        offset = self.window.rows.start * keys.stride(0) * keys.element_size()
        return keys.data_ptr() + offset, values.data_ptr() + offset

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        w = self.window
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            if w.column_1 is None:
                buffer[w.rows, :, w.column : w.end] = states
            else:
                buffer[w.rows].index_copy_(2, w.column_1, states)
        return self.keys, self.values

    @property
    def is_compileable(self) -> bool:
        """True if transformers must take lengths as tensors and may not leave out masks."""
        return self.window.column_1 is not None

    def get_seq_length(self) -> int | Tensor:
        w = self.window
        return w.column - w.low if w.column_1 is None else w.column_1[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.end - self.window.low, 0

    def get_max_length(self) -> int:
        return -1

    def resize(self) -> None:
        """Gives the buffers the window's `num_rows` and `width`, and keeps what fits of them."""
        num_rows, width = self.window.num_rows, self.window.width
        for index, old in enumerate(self._buffers):
            if (old.shape[0], old.shape[2]) != (num_rows, width):
                kept = old[:num_rows, :, :width]
                resized = self._room_for(old)
                resized[: kept.shape[0], :, : kept.shape[2]] = kept
                self._buffers[index] = resized

    def copy_row(self, source: int, target: int, columns: slice) -> None:
        for buffer in self._buffers:
            buffer[target, :, columns] = buffer[source, :, columns]

    def write(self, row: int, columns: slice, keys_and_values: tuple[Tensor, Tensor]) -> None:
        """Writes keys and values, [heads, columns, dim] each, to columns of a row."""
        if not self.is_initialized:
            keys, values = keys_and_values
            self.lazy_initialization(keys[None], values[None])
        for buffer, states in zip(self._buffers, keys_and_values, strict=True):
            buffer[row, :, columns] = states

    def copy_of(self, row: int, columns: slice) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[row, :, columns].clone() for buffer in self._buffers)
        return keys, values

    def move_columns(self, num_rows: int, columns: slice, by: int) -> None:
        moved = slice(columns.start + by, columns.stop + by)
        for buffer in self._buffers:
            buffer[:num_rows, :, moved] = buffer[:num_rows, :, columns].clone()

    def take_columns(self, columns: slice, source_NC: Tensor) -> None:
        for buffer in self._buffers:
            rows = buffer[: len(source_NC)]
            index = source_NC[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
            rows[:, :, columns] = rows.gather(2, index)

    def wipe_row(self, row: int) -> None:
        for buffer in self._buffers:
            buffer[row].zero_()


class WindowedCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """KV cache of all layers of a model, with one window.

    It grows to the rows and columns that `reserve` asks for. It reserves rows ahead, but not more
    than `most_ahead`. Keys and values are stored in `dtype`, or in their own dtype if it is None.

    `is_damaged` is true if an error has interrupted a move of columns. The layers then differ.
    `version` changes whenever the buffers may have new addresses, which `is_static` makes rare.
    """

    def __init__(self, *, max_rows: int, max_width: int, dtype: torch.dtype | None = None) -> None:
        self.max_rows, self.max_width = max_rows, max_width
        self.most_ahead = max_rows
        self.is_damaged = False
        self.is_static = False
        self.version = 0
        self._counted = (0, 0, 0), 0  # shape of the cache, and its bytes
        self.window = Window(*self._first_size())
        self._new_layer = partial(WindowedLayer, self.window, dtype)
        super().__init__(layer_class_to_replicate=self._new_layer)

    def open_layers(self, num_layers: int, like_NKWD: Tensor) -> None:
        """Creates the missing layers, with the heads, size and dtype of `like_NKWD`."""
        while len(self.layers) < num_layers:
            self.layers.append(self._new_layer())
            self.layers[-1].lazy_initialization(like_NKWD, like_NKWD)

    def _first_size(self) -> tuple[int, int]:
        return min(FIRST_ROWS, self.max_rows), min(FIRST_WIDTH, self.max_width)

    @property
    def num_bytes(self) -> int:
        shape = (self.window.num_rows, self.window.width, len(self.layers))
        if shape != self._counted[0]:  # the sum is kept, because every step asks for it
            self._counted = shape, sum(layer.num_bytes for layer in self.layers)
        return self._counted[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the present width; 0 before the first model call."""
        return self.num_bytes // self.window.num_rows

    def reserve(self, num_rows: int, width: int) -> None:
        """Makes room for at least `num_rows` rows and `width` columns.

        If memory is exhausted, the cache keeps its size and contents.
        """
        assert num_rows <= self.max_rows, "admission let in too many rows"
        assert width <= self.max_width, "admission let in a sequence longer than the batch is wide"
        w = self.window
        if num_rows <= w.num_rows and width <= w.width:
            return
        before = w.num_rows, w.width
        if num_rows > w.num_rows:
            ahead = min(2 * w.num_rows, self.most_ahead)
            w.num_rows = min(self.max_rows, max(num_rows, ahead))
        if width > w.width:
            w.width = min(self.max_width, max(width, 2 * w.width))
        try:
            self._resize_layers()
        except (MemoryError, RuntimeError):  # CUDA and the CPU allocator raise RuntimeError
            w.num_rows, w.width = before
            self._resize_layers()
            raise

    def _resize_layers(self) -> None:
        self.version += 1
        for layer in self.layers:
            layer.resize()

    def shrink(self) -> None:
        """Frees large buffers, with their contents.

        Small buffers stay, because the allocation of new memory is slower than a prefill.
        """
        if self.num_bytes > (STATIC_KEPT_BYTES if self.is_static else KEPT_BYTES):
            self.free()

    def free(self) -> None:
        """Frees all buffers, with their contents."""
        self.version += 1
        self.window.num_rows, self.window.width = self._first_size()
        self.layers.clear()

    def copy_row(self, source: int, target: int, columns: slice) -> None:
        for layer in self.layers:
            layer.copy_row(source, target, columns)

    def move_columns(self, num_rows: int, columns: slice, by: int) -> None:
        self.is_damaged = True
        for layer in self.layers:
            layer.move_columns(num_rows, columns, by)
        self.is_damaged = False

    def take_columns(self, columns: slice, source_NC: Tensor) -> None:
        """Copies the source columns of each row into `columns`."""
        self.is_damaged = True
        for layer in self.layers:
            layer.take_columns(columns, source_NC)
        self.is_damaged = False

    def copy_of(self, row: int, columns: slice) -> list[tuple[Tensor, Tensor]]:
        """Returns a copy of each layer's keys and values, [heads, columns, dim], in one row."""
        return [layer.copy_of(row, columns) for layer in self.layers]

    def write(
        self, row: int, first_column: int, layers: list[tuple[Tensor, Tensor]], num_columns: int
    ) -> None:
        """Writes the first `num_columns` columns of copies from `copy_of` to a row."""
        columns = slice(first_column, first_column + num_columns)
        while len(self.layers) < len(layers):
            self.layers.append(self._new_layer())
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            layer.write(row, columns, (keys[:, :num_columns], values[:, :num_columns]))

    def wipe_row(self, row: int) -> None:
        for layer in self.layers:
            layer.wipe_row(row)
