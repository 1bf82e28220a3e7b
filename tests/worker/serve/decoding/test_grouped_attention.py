"""The batch as it runs on a CUDA device: the layers of transformers, and no repeated keys."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.decoding.families import _causal
from worker.serve.decoding.grouped_attention import NAME, attend, use_grouped_attention

CLOSE = 1e-4  # relative to a row's largest logit: float32 rounding


class LargestTensor(TorchDispatchMode):
    """Notes the most values that an operation has returned in a tensor."""

    most_values = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: torch does not type what it dispatches
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.most_values = max(self.most_values, tensor.numel())
        return result


@pytest.fixture
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    """Four query heads share two key heads."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    use_grouped_attention(loaded.eval().requires_grad_(False))
    assert loaded.config._attn_implementation == NAME
    return loaded


@pytest.mark.usefixtures("small_first_buffers")
@pytest.mark.parametrize("column_bucket", [1, 8, 64])
def test_logits_equal_a_plain_forward_pass(
    model: PreTrainedModel, largest_difference: Callable[..., float], column_bucket: int
) -> None:
    batch = CursorBatch(model, max_rows=6, max_width=48)
    batch.family = replace(batch.family, forward=_causal, cache_dtype=None)
    batch.column_bucket = column_bucket
    assert largest_difference(batch, seed=column_bucket) < CLOSE


@pytest.mark.parametrize("num_queries", [1, 5])
def test_attention_equals_that_over_repeated_keys(num_queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 8, num_queries, 16, generator=generator)
    key, value = torch.randn(2, 3, 2, 40, 16, generator=generator)
    mask = torch.rand(3, 1, num_queries, 40, generator=generator) > 0.3
    module: Any = SimpleNamespace(num_key_value_groups=4)  # stands for an attention layer
    expected, _ = sdpa_attention_forward(module, query, key, value, mask)
    with LargestTensor() as largest:
        attended, _ = attend(module, query, key, value, mask)
    torch.testing.assert_close(attended, expected)
    assert largest.most_values < key.numel() * 4


def test_windows_with_a_past_have_few_widths(model: PreTrainedModel) -> None:
    batch = CursorBatch(model, max_rows=4, max_width=256)
    batch.column_bucket = 16
    widths = set()
    batch.join([list(range(3, 40)), [5, 6]])
    for token in range(3, 60):
        batch.advance([token, token])
        widths.add(batch.cache.window.end - batch.cache.window.low)
    assert widths == {48, 64, 80, 96}
