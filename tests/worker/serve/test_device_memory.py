"""The size of a prefill on a GPU, which its free memory decides."""

import pytest

from tests.worker.serve.decoding.test_families import tiny
from worker.serve.device_memory import (
    LEAST_PREFILL_TOKENS,
    MOST_PREFILL_TOKENS,
    PrefillMemory,
)

GIB = 2**30
NEEDS = PrefillMemory(token_bytes=65_536, column_bytes=13)


def test_the_tokens_of_a_prefill_take_half_of_the_free_memory() -> None:
    num_tokens = NEEDS.num_tokens_in(GIB, 4096)
    assert LEAST_PREFILL_TOKENS < num_tokens < MOST_PREFILL_TOKENS
    assert NEEDS.num_bytes(num_tokens, 4096) <= GIB // 2 < NEEDS.num_bytes(num_tokens + 1, 4096)


def test_longer_rows_get_fewer_tokens() -> None:
    assert NEEDS.num_tokens_in(GIB, 65_536) < NEEDS.num_tokens_in(GIB, 1024)


def test_the_tokens_of_a_prefill_have_bounds() -> None:
    assert NEEDS.num_tokens_in(0, 4096) == LEAST_PREFILL_TOKENS
    assert NEEDS.num_tokens_in(80 * GIB, 4096) == MOST_PREFILL_TOKENS


@pytest.mark.parametrize(
    ("name", "mlp_size", "column_bytes"),
    [
        ("llama", 64, 1 + 2 * 5),  # two query heads per key head
        ("gpt2", 128, 1 + 5),  # 4 H
        ("bloom", 128, 1 + 5),
        ("t5-tied", 64, 2 * 4 * 4),  # scores of four heads in float32, with a position bias
        ("bert+wider roberta", 64, 2 * 4 * 4),
    ],
)
def test_memory_per_token_follows_the_config(name: str, mlp_size: int, column_bytes: int) -> None:
    needs = PrefillMemory.of(tiny(name).float())
    hidden_size = 48 if "wider" in name else 32
    assert needs == PrefillMemory(4 * (3 * mlp_size + 4 * hidden_size), column_bytes)
