"""Static decode steps, and their replays, against plain steps and plain forward passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionMaskInterface, masking_utils

from tests.worker.serve.decoding.op_recorder import OpRecorder
from tests.worker.serve.decoding.test_families import SEQ2SEQ_CONFIGS, tiny
from worker.models.attention_masks import unread_sdpa_mask
from worker.serve.cuda_graphs import GraphCache
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.decoding.decoder import Decoder, Sequence
from worker.serve.decoding.families import CAUSAL
from worker.serve.decoding.sampling import TokenSampler
from worker.serve.decoding.static_step import StaticStep, rounded_columns, rounded_rows
from worker.serve.loading import LoadedModel
from worker.serve.speculative import SpeculativeDecoder

pytestmark = pytest.mark.usefixtures("small_first_buffers")

FAMILIES = [*sorted(CAUSAL), *SEQ2SEQ_CONFIGS]
CLOSE, FAR = 1e-5, 1e-2  # relative, in float64: logits are given in float32
FLOAT32 = 1e-4  # the same in float32
WIDTH = 40
SMALL = 8  # columns of a bucket


@pytest.fixture(autouse=True)
def _masks_as_on_a_gpu() -> Any:
    """Masks are not read on a GPU to see whether they can be left out."""

    def unread(**options: Any) -> Tensor | None:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor | None = masking_utils.sdpa_mask(**(options | skips))
        return mask

    AttentionMaskInterface.register("sdpa", unread)
    yield
    AttentionMaskInterface.register("sdpa", unread_sdpa_mask)


def static_batch(
    model: Any,  # Any: transformers is untyped here
    *,
    max_rows: int = 5,
    recorder: OpRecorder | None = None,
    kind: type[CursorBatch] = CursorBatch,
) -> CursorBatch:
    """A batch with static steps, whose windows have a multiple of 8 columns."""
    batch = kind(model, max_rows=max_rows, max_width=WIDTH, max_source_width=WIDTH, steps="static")
    static = static_of(batch)
    static.round_columns = lambda number: -(-number // SMALL) * SMALL
    if recorder is not None:
        static.graphs = GraphCache(recorder)
    return batch


def static_of(batch: CursorBatch) -> StaticStep:
    assert batch.static is not None
    return batch.static


@pytest.mark.parametrize("name", FAMILIES)
def test_a_static_step_of_the_same_shape_gives_exactly_the_plain_logits(name: str) -> None:
    """The longest prompt stays in the batch, so that plain windows begin at column 0, too."""
    model = tiny(name).float()
    plain, static = (static_batch(model) for _ in range(2))
    plain.static = None
    static_of(static).round_rows = static_of(static).round_columns = lambda number: number
    batches = (plain, static)
    longest = list(range(5, 17))

    def check(logits: list[Tensor]) -> None:
        assert torch.equal(*logits)

    if plain.family.can_pad_prompts:
        check([batch.join([longest, [20, 21, 22]]) for batch in batches])
    else:
        for prompt in (longest, [20, 21, 22]):
            check([batch.join([prompt]) for batch in batches])
    for number in range(12):
        if number == 3:
            check([batch.join([[30, 31, 32, 33, 34]]) for batch in batches])
        if number == 6:
            for batch in batches:
                batch.leave(1)
        if number == 8:
            check([batch.join([[41]]) for batch in batches])
        tokens = [50 + number + row for row in range(plain.num_rows)]
        check([batch.advance(tokens) for batch in batches])
    for layer, other in zip(plain.cache.layers, static.cache.layers, strict=True):
        for row, start in enumerate(plain.starts):
            for buffer, same in zip(layer._buffers, other._buffers, strict=True):
                live = slice(start, plain.cursor)
                assert torch.equal(buffer[row, :, live], same[row, :, live])


@pytest.mark.parametrize("name", FAMILIES)
def test_replays_give_the_logits_of_a_plain_forward_pass(
    name: str, largest_difference: Callable[..., float]
) -> None:
    """Rows join, leave, slide and grow at random. Windows and rows are padded."""
    batch = static_batch(tiny(name), recorder=OpRecorder())
    longest = 40 if batch.family.has_encoder else 20
    assert largest_difference(batch, seed=3, longest=longest) < CLOSE
    graphs = static_of(batch).graphs
    assert graphs is not None
    assert graphs.num_replayed > 5
    assert not graphs.is_off


class StaleGraphs(StaticStep):
    """Keeps graphs although the cache has moved."""

    def run(self, *arguments: Any) -> Tensor:
        if self.logits_PV is not None:
            self._versions = [cache.version for cache in self._caches()]
        return super().run(*arguments)


class CursorOfTheRecording(CursorBatch):
    """Writes the column that was the cursor when the graph was recorded."""

    def _static_step(self, static: StaticStep, tokens: Any) -> Tensor:
        window = self.cache.window
        opened = type(window).open_static

        def baked(num_rows: int, *, end: int, column_1: Tensor) -> None:
            opened(window, num_rows, end=end, column_1=torch.full((1,), self.cursor))

        window.open_static = baked  # type: ignore[method-assign]
        return super()._static_step(static, tokens)


@pytest.mark.parametrize("kind", [StaticStep, StaleGraphs])
def test_graphs_of_old_buffers_are_dropped(gpt2: LoadedModel, kind: type[StaticStep]) -> None:
    """Columns that a stale graph had written to old buffers would be missing in a wider window."""
    plain, batch = (static_batch(gpt2.model, recorder=OpRecorder()) for _ in range(2))
    plain.static = None
    static_of(batch).__class__ = kind
    for each in (plain, batch):
        each.join([[5, 6, 7]])
    for cursor in range(3, 10):
        if cursor == 5:
            batch.cache.reserve(1, WIDTH)
        expected, found = (each.advance([20 + cursor]) for each in (plain, batch))
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error > FAR if kind is StaleGraphs else error < FLOAT32


def test_a_cursor_from_the_recording_would_be_seen(
    gpt2: LoadedModel, largest_difference: Callable[..., float]
) -> None:
    batch = static_batch(gpt2.model, recorder=OpRecorder(), kind=CursorOfTheRecording)
    assert largest_difference(batch, seed=3) > FAR


@pytest.mark.parametrize("name", ["llama", "t5-tied"])
def test_padding_rows_write_no_cell_that_a_sequence_uses(name: str) -> None:
    batch = static_batch(tiny(name))
    batch.join([[5, 6, 7, 8, 9]])
    batch.join([[20, 21]])
    batch.join([[30, 31, 32]])
    before = [[buffer.clone() for buffer in layer._buffers] for layer in batch.cache.layers]
    cursor = batch.cursor
    batch.advance([40, 41, 42])
    assert static_of(batch).shape_of(3, cursor).num_rows == 4
    for layer, buffers in zip(batch.cache.layers, before, strict=True):
        for buffer, old in zip(layer._buffers, buffers, strict=True):
            is_other = torch.arange(buffer.shape[2]) != cursor
            assert torch.equal(buffer[:, :, is_other], old[:, :, is_other])
            assert buffer.isfinite().all()
            assert (buffer[:3, :, cursor] != old[:3, :, cursor]).any(-1).all()


def test_a_batch_without_old_columns_slides_to_a_smaller_window(llama: LoadedModel) -> None:
    batch = static_batch(llama.model)
    batch.join([list(range(5, 30))])
    batch.join([[5, 6]])
    batch.leave(0)
    logits_NV = batch.advance([7])
    assert (batch.starts, batch.cursor) == ([0], 3)
    other = static_batch(llama.model)
    torch.testing.assert_close(other.join([[5, 6, 7]]), logits_NV, rtol=1e-4, atol=1e-4)


def decoded(batch: CursorBatch) -> list[list[int]]:
    """Runs sequences of different lengths on few rows, and returns their tokens."""
    return tokens_of(Decoder(batch.model, max_running=3, max_context_tokens=WIDTH, batch=batch))


def tokens_of(decoder: Decoder) -> list[list[int]]:
    sequences = [
        Sequence(
            request_id=str(number),
            prompt=tuple(range(5 + number, 5 + number + length)),
            max_tokens=6 + 3 * number,
            end_ids=frozenset(),
            sampler=TokenSampler(),
        )
        for number, length in enumerate((3, 9, 1, 14, 6))
    ]
    for sequence in sequences:
        decoder.add(sequence)
    while decoder.has_work():
        list(decoder.step())  # a decoder with a draft returns an iterator
    return [sequence.tokens for sequence in sequences]


def test_a_decoder_gives_the_same_tokens_with_replays(loaded: LoadedModel) -> None:
    recorder = OpRecorder()
    plain = CursorBatch(loaded.model, max_rows=3, max_width=WIDTH)
    batch = static_batch(loaded.model, max_rows=3, recorder=recorder)
    assert decoded(batch) == decoded(plain)
    assert recorder.num_recorded > 0


def test_static_steps_continue_rows_that_a_draft_has_advanced(llama: LoadedModel) -> None:
    """With more than one row, steps are static. With one row, the draft proposes tokens."""
    recorder = OpRecorder()
    decoder = SpeculativeDecoder(
        llama.model,
        draft=llama.model,
        num_draft_tokens=3,
        max_running=3,
        max_context_tokens=WIDTH,
        steps="static",
    )
    static_of(decoder.batch).graphs = GraphCache(recorder)
    assert tokens_of(decoder) == decoded(CursorBatch(llama.model, max_rows=3, max_width=WIDTH))
    assert recorder.num_recorded > 0
    assert decoder.counts.num_accepted > 0


def test_after_a_failed_recording_steps_are_plain(loaded: LoadedModel) -> None:
    recorder = OpRecorder(failing=2)
    batch = static_batch(loaded.model, max_rows=3, recorder=recorder)
    plain = CursorBatch(loaded.model, max_rows=3, max_width=WIDTH)
    assert decoded(batch) == decoded(plain)
    assert recorder.num_recorded == 2
    assert static_of(batch).is_off
    assert static_of(batch).reserved_bytes == 0


def test_graphs_count_as_memory_of_the_cache_until_it_is_freed(llama: LoadedModel) -> None:
    batch = static_batch(llama.model, recorder=OpRecorder())
    batch.join([[5, 6, 7]])
    for _ in range(3):
        batch.advance([8])
    graphs = static_of(batch).graphs
    assert graphs is not None
    assert len(graphs) == 1
    cells = sum(cache.num_bytes for cache in batch._caches()) + batch.prefixes.num_bytes
    assert batch.cache_bytes > cells + graphs.num_bytes > cells
    assert batch.reserved_bytes >= graphs.num_bytes
    batch.leave(0)
    batch.free()
    assert (len(graphs), batch.cache_bytes) == (0, 0)


def test_shapes_waste_at_most_a_quarter() -> None:
    numbers = range(1, 4097)
    assert len({rounded_columns(number) for number in numbers}) == 20
    for number in numbers:
        assert rounded_columns(number) % 64 == 0
        assert number <= rounded_columns(number) <= max(number + 63, 1.25 * number)
    rows = {1: 1, 2: 2, 3: 4, 5: 8, 8: 8, 9: 16, 33: 40, 65: 80, 256: 256}
    assert {number: rounded_rows(number) for number in rows} == rows
