"""Prompts that begin alike are read once."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.decoding.families import Call
from worker.serve.decoding.kv_cache import WindowedCache
from worker.serve.decoding.prefix_cache import Prefixes
from worker.serve.loading import LoadedModel

BEGINNING = list(range(5, 25))


@pytest.fixture
def cache() -> WindowedCache:
    cache = WindowedCache(max_rows=1, max_width=64)
    cache.window.open(slice(0, 1), low=0, column=0, end=64)
    cache.update(torch.zeros(1, 2, 64, 4), torch.zeros(1, 2, 64, 4), 0)
    return cache


def test_the_prompt_that_begins_most_alike_is_found(cache: WindowedCache) -> None:
    prefixes = Prefixes(max_tokens=100)
    for prompt in ([*BEGINNING[:10], *range(50, 60)], [*BEGINNING, *range(60, 70)]):
        prefixes.keep(prompt, cache, 0, slice(0, len(prompt)))
    found, num_shared = prefixes.find([*BEGINNING, 1, 2])
    assert found is not None
    assert found.tokens[-1] == 69
    assert num_shared == len(BEGINNING)


def test_the_last_token_is_always_read(cache: WindowedCache) -> None:
    prefixes = Prefixes(max_tokens=100)
    prefixes.keep(BEGINNING, cache, 0, slice(0, 20))
    assert prefixes.find(BEGINNING)[1] == len(BEGINNING) - 1


def test_what_was_used_longest_ago_goes_first(cache: WindowedCache) -> None:
    prefixes = Prefixes(max_tokens=50)
    first, second, third = ([base + i for i in range(20)] for base in (0, 100, 200))
    for prompt in (first, second, first, third):
        prefixes.keep(prompt, cache, 0, slice(0, 20))
    assert [prefixes.find(prompt)[1] for prompt in (first, second, third)] == [19, 0, 19]


def test_only_what_is_new_goes_through_the_model(
    llama: LoadedModel, next_logits: Callable[[nn.Module, list[int]], Tensor]
) -> None:
    batch = CursorBatch(llama.model, max_rows=4, max_width=64)
    widths: list[int] = []

    def forward(model: nn.Module, call: Call) -> Tensor:
        widths.append(call.tokens_NQ.shape[1])
        return forward_of(model, call)

    forward_of = batch.family.forward
    batch.family = replace(batch.family, forward=forward)
    batch.join([[*BEGINNING, 30, 31, 32]])
    prompts = [[*BEGINNING, 40, 41], [*BEGINNING[:19], 50, 51, 52, 53]]
    found_KV = batch.join(prompts)
    assert widths == [23, 4]
    for prompt, found_V in zip(prompts, found_KV, strict=True):
        torch.testing.assert_close(found_V, next_logits(llama.model, prompt), rtol=1e-4, atol=1e-4)
