"""What the decoder looks at: computed once a row, moved with it, and never mixed up with another's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.decoding.encoder_cache import EncoderCache
from worker.serve.loading import LoadedModel

Drive = Callable[..., float]
PROMPTS = [[5, 6, 7], list(range(10, 40)), [9]]

pytestmark = pytest.mark.usefixtures("small_first_buffers")


@pytest.fixture(scope="module")
def exact_bart(bart: LoadedModel) -> Any:  # Any: transformers is untyped here
    return copy.deepcopy(bart.model).double()


def batch_of(model: Any, kind: type[CursorBatch] = CursorBatch) -> CursorBatch:
    return kind(model, max_rows=5, max_width=40, max_source_width=40)


class PositionPlusOne(CursorBatch):
    def _positions(self, columns_Q: Tensor, starts_N1: Tensor) -> Tensor:
        return super()._positions(columns_Q, starts_N1) + 1


class AnswerRowNotMoved(CursorBatch):
    def _copy_row(self, source: int, target: int) -> None:
        pass


class PaddingSeen(EncoderCache):
    def _mask(self, rows: slice) -> Tensor:
        return torch.ones_like(super()._mask(rows))


class LastTokenHidden(EncoderCache):
    def _mask(self, rows: slice) -> Tensor:
        mask_NS = super()._mask(rows)
        return torch.cat([mask_NS[:, :1], mask_NS[:, 1:] & mask_NS[:, 1:].roll(-1, dims=1)], dim=1)


class SourceRowNotMoved(EncoderCache):
    def _copy(self, source: int, target: int) -> None:
        pass


class LengthNotMoved(EncoderCache):
    def leave(self, row: int, *, is_poisoned: bool) -> None:
        kept = self.lengths[:-1]
        super().leave(row, is_poisoned=is_poisoned)
        self.lengths = kept


@pytest.mark.parametrize(
    "broken",
    [
        PositionPlusOne,
        AnswerRowNotMoved,
        PaddingSeen,
        LastTokenHidden,
        SourceRowNotMoved,
        LengthNotMoved,
    ],
)
def test_each_mistake_would_be_seen(
    exact_bart: Any, largest_difference: Drive, monkeypatch: pytest.MonkeyPatch, broken: type
) -> None:
    kind = broken
    if not issubclass(broken, CursorBatch):
        monkeypatch.setattr("worker.serve.decoding.cursor_batch.EncoderCache", broken)
        kind = CursorBatch
    # test_families.py has the same drive without a mistake
    assert largest_difference(batch_of(exact_bart, kind), seed=3, longest=40) > 1e-2


def test_a_prompt_is_encoded_once_and_its_keys_are_computed_once(
    encoder_decoder: LoadedModel,
) -> None:
    model: Any = copy.deepcopy(encoder_decoder.model)
    calls: list[str] = []
    model.get_encoder().register_forward_hook(lambda *_: calls.append("encoder"))
    cross = [
        module
        for name, module in model.named_modules()
        if name.endswith(("EncDecAttention.k", "encoder_attn.k_proj", "crossattention.self.key"))
    ]
    assert len(cross) == 4
    for module in cross:
        module.register_forward_hook(lambda *_: calls.append("keys"))
    batch = batch_of(model)
    batch.join(PROMPTS)
    for _ in range(5):
        batch.advance([7] * batch.num_rows)
    batch.fork(1)
    batch.advance([7] * batch.num_rows)
    assert (calls.count("encoder"), calls.count("keys")) == (1, 4)
    batch.join([[8]])
    assert (calls.count("encoder"), calls.count("keys")) == (2, 8)


def test_a_step_looks_no_further_than_the_longest_prompt_alive(bart: LoadedModel) -> None:
    batch = batch_of(bart.model)
    batch.join(PROMPTS)
    assert batch.sources is not None
    batch.advance([7, 7, 7])
    assert batch.sources.cache.layers[0].keys.shape[2] == 30
    batch.leave(1)
    batch.advance([7, 7])
    assert batch.sources.cache.layers[0].keys.shape[2] == 3


def test_numbers_that_are_none_do_not_reach_the_next_tenant_of_a_row(
    exact_bart: Any, next_logits: Callable[..., Tensor]
) -> None:
    batch = batch_of(exact_bart)
    batch.join(PROMPTS[:2])
    assert batch.sources is not None
    for layer in batch.sources.cache.layers:
        layer.values[0].fill_(torch.nan)
    logits_NV = batch.advance([5, 5])
    assert logits_NV[0].isnan().all()
    assert logits_NV[1].isfinite().all()
    batch.leave(0, is_poisoned=True)
    [logits_V] = batch.join([[21, 22]])
    expected_V = next_logits(exact_bart, [batch.family.start_token], [21, 22])
    torch.testing.assert_close(logits_V.double(), expected_V, rtol=1e-5, atol=1e-5)
    assert batch.advance([5, 5]).isfinite().all()


def test_an_empty_batch_gives_large_buffers_back(
    bart: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.serve.decoding.kv_cache.KEPT_BYTES", 1000)
    batch = batch_of(bart.model)
    batch.join(PROMPTS)
    assert batch.sources is not None
    assert batch.sources.cache.window.width >= 30
    for _ in PROMPTS:
        batch.leave(0)
    assert (batch.sources.cache.window.width, batch.sources.cache.window.num_rows) == (16, 2)
    assert not batch.sources.cache.layers
    batch.join(PROMPTS)  # and takes new ones
    assert batch.advance([7, 7, 7]).isfinite().all()
