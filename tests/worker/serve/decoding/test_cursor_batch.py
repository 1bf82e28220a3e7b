"""The shared-cursor batch against a plain forward pass, and against broken versions of itself."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from worker.cpu.linear_ops import HAS_BFLOAT16
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.decoding.kv_cache import KEPT_BYTES
from worker.serve.device_memory import PrefillMemory
from worker.serve.loading import LoadedModel, load_model

Drive = Callable[..., float]
CLOSE, FAR = 1e-4, 1e-2  # relative to a row's largest logit: float32 rounding, and a mistake
ROUNDED = 0.15  # numbers of 8 bits, rounded at other places: .05; a row that saw what is not its own was off by 1.5
WIDTH = 48

pytestmark = pytest.mark.usefixtures("small_first_buffers")


@pytest.mark.parametrize("seed", range(4))
def test_logits_equal_a_plain_forward_pass_under_random_joins_and_leaves(
    loaded: LoadedModel, largest_difference: Drive, seed: int
) -> None:
    batch = CursorBatch(loaded.model, max_rows=6, max_width=WIDTH)
    assert largest_difference(batch, seed=seed) < CLOSE


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU does not support bfloat16 matmuls")
@pytest.mark.parametrize("seed", range(4))
def test_rounded_weights_see_the_same_tokens(
    tiny_llama_dir: Path, largest_difference: Drive, seed: int
) -> None:
    model = load_model(tiny_llama_dir, weights="bfloat16").model
    batch = CursorBatch(model, max_rows=6, max_width=WIDTH)
    assert largest_difference(batch, seed=seed) < ROUNDED


def test_float64_leaves_no_difference_but_rounding(
    loaded: LoadedModel, largest_difference: Drive
) -> None:
    batch = CursorBatch(copy.deepcopy(loaded.model).double(), max_rows=6, max_width=WIDTH)
    assert largest_difference(batch, seed=7) < 1e-6  # logits are given in float32


def test_the_drive_slides_both_ways_and_grows(
    llama: LoadedModel, largest_difference: Drive
) -> None:
    slides: list[int] = []
    widths: set[int] = set()

    class Watched(CursorBatch):
        def _slide(self, by: int) -> None:
            if self.starts:
                slides.append(by)
            super()._slide(by)

        def _positions(self, columns_Q: Tensor, starts_N1: Tensor) -> Tensor:
            widths.add(self.cache.window.width)
            return super()._positions(columns_Q, starts_N1)

    for seed in range(4):
        largest_difference(Watched(llama.model, max_rows=6, max_width=WIDTH), seed=seed)
    assert min(slides) < 0 < max(slides)
    assert {16, WIDTH} <= widths


class PositionPlusOne(CursorBatch):
    def _positions(self, columns_Q: Tensor, starts_N1: Tensor) -> Tensor:
        return super()._positions(columns_Q, starts_N1) + 1


class FirstTokenHidden(CursorBatch):
    def _mask(self, columns_W: Tensor, starts_N1: Tensor) -> Tensor:
        return (columns_W > starts_N1).long()


class StaleTokenSeen(CursorBatch):
    def _mask(self, columns_W: Tensor, starts_N1: Tensor) -> Tensor:
        return super()._mask(columns_W, starts_N1 - 1)


class RowNotMoved(CursorBatch):
    def _copy_row(self, source: int, target: int) -> None:
        pass


class ColumnsNotSlid(CursorBatch):
    def _slide(self, by: int) -> None:
        self.starts = [start + by for start in self.starts]
        self.cursor += by


class StartsNotSlid(CursorBatch):
    def _slide(self, by: int) -> None:
        starts = list(self.starts)
        super()._slide(by)
        self.starts = [min(start, self.cursor) for start in starts]


@pytest.mark.parametrize(
    "broken",
    [PositionPlusOne, FirstTokenHidden, StaleTokenSeen, RowNotMoved, ColumnsNotSlid, StartsNotSlid],
)
def test_each_mistake_would_be_seen(
    gpt2: LoadedModel, largest_difference: Drive, broken: type[CursorBatch]
) -> None:
    worst = max(
        largest_difference(broken(gpt2.model, max_rows=6, max_width=WIDTH), seed=seed)
        for seed in range(2)
    )
    assert worst > FAR


def test_a_row_may_fill_the_whole_width(
    loaded: LoadedModel, next_logits: Callable[..., Tensor]
) -> None:
    batch = CursorBatch(loaded.model, max_rows=2, max_width=WIDTH)
    tokens = list(range(10, 20))
    batch.join([tokens, tokens[:3]])
    while len(tokens) < WIDTH:
        tokens.append(20 + len(tokens))
        logits_NV = batch.advance([tokens[-1]] * batch.num_rows)
        if len(tokens) == 30:
            batch.leave(1)
    torch.testing.assert_close(
        logits_NV[0], next_logits(loaded.model, tokens), rtol=1e-3, atol=1e-3
    )


def test_numbers_that_are_none_do_not_reach_the_next_tenant_of_a_row(
    llama: LoadedModel, next_logits: Callable[..., Tensor]
) -> None:
    batch = CursorBatch(llama.model, max_rows=2, max_width=WIDTH)
    batch.join([[5, 6, 7], [8, 9, 10, 11, 12, 13]])
    for layer in batch.cache.layers:
        layer.values[0].fill_(torch.nan)
    assert batch.advance([5, 5])[0].isnan().all()
    batch.leave(0, is_poisoned=True)
    logits_NV = batch.join([[21, 22]])
    torch.testing.assert_close(
        logits_NV[0], next_logits(llama.model, [21, 22]), rtol=1e-3, atol=1e-3
    )
    assert batch.advance([5, 5]).isfinite().all()


def test_an_empty_batch_gives_large_buffers_back_and_keeps_others(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = CursorBatch(llama.model, max_rows=6, max_width=WIDTH)
    for num_bytes in (KEPT_BYTES, 1000):
        monkeypatch.setattr("worker.serve.decoding.kv_cache.KEPT_BYTES", num_bytes)
        batch.join([list(range(10, 50)), [5], [6], [7]])
        width = batch.cache.window.width
        assert width >= 40
        for _ in range(4):
            batch.leave(0)
        is_kept = num_bytes == KEPT_BYTES
        assert (batch.cache.window.width, batch.cursor) == (width if is_kept else 16, 0)
        assert bool(batch.cache.layers) == is_kept
    assert batch.cache.window.num_rows == 2


class FixedMemory(PrefillMemory):
    """Memory for `token_bytes` tokens, whatever the length of their rows."""

    def num_tokens(self, num_columns: int) -> int:
        return self.token_bytes


@pytest.mark.parametrize("num_tokens", [1, 7, 16, 1000])
def test_a_prefill_in_chunks_gives_the_logits_of_one_forward_pass(
    loaded: LoadedModel, num_tokens: int
) -> None:
    """Float32 sums of other lengths differ by rounding, relative to the largest logit."""
    prompts = [list(range(5, 40)), list(range(8, 20)), [*range(5, 30), 77, 78]]
    whole, chunked = (CursorBatch(loaded.model, max_rows=4, max_width=WIDTH) for _ in range(2))
    chunked.prefill_memory = FixedMemory(num_tokens, 0)
    for batch in (whole, chunked):
        batch.join([[5, 6, 7]])
    for name in ("join", "advance"):
        logits = [
            batch.join(prompts) if name == "join" else batch.advance([9, 8, 7, 6])
            for batch in (whole, chunked)
        ]
        scale = float(logits[0].abs().max())
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5 * scale)


def test_the_very_first_prompt_may_have_one_token(tiny_llama_dir: Path) -> None:
    for keeps_plain in (True, False):
        served = load_model(tiny_llama_dir, keeps_plain=keeps_plain).model
        batches = [CursorBatch(served, max_rows=2, max_width=WIDTH) for _ in range(2)]
        batches[1].join([[9, 8, 7]])
        first, later = (batch.join([[7]]) for batch in batches)
        torch.testing.assert_close(first, later)
        torch.testing.assert_close(batches[0].advance([8]), batches[1].advance([6, 8])[1:])
