"""The estimated GPU memory of training steps, compared with traces of steps of real sizes."""

from typing import Any

import pytest

Json = dict[str, Any]  # Any: open-ended JSON
TOLERANCE = 0.1
PAIRS = (
    "7B -> 1B",
    "1.5B -> 0.5B",
    "SmolLM2, 30 -> 15 layers",
    "GPT-2, 12 -> 6 layers",
    "T5, 12 -> 6 layers",
    "1.5B -> 0.5B, activation checkpointing",
    "SmolLM2, accumulated",
    "SmolLM2, LoRA",
    "SmolLM2, hidden states",
    "1.5B -> 0.5B, hidden states",
    "SmolLM2, attention relations",
    "SmolLM2, rollouts",
)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_estimate_is_close_to_a_trace(steps: dict[str, Json], pair: str) -> None:
    step = steps[pair]
    assert "error" not in step, step["error"]
    assert step["estimated"] == pytest.approx(step["traced"], rel=TOLERANCE)


def test_micro_batches_are_accumulated_in_one_case(steps: dict[str, Json]) -> None:
    assert [pair for pair, step in steps.items() if step["num_pieces"] > 1] == [
        "SmolLM2, accumulated"
    ]


def test_all_traced_pairs_are_compared(steps: dict[str, Json]) -> None:
    assert tuple(steps) == PAIRS
