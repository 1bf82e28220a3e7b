"""The layers that a student keeps: measured states against transformers, and the choice."""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from app.contracts.architectures import distilled
from tests.tiny import save_tiny
from worker.distill.data.rows import Example
from worker.distill.students.recipe import load_model
from worker.distill.training.layer_choice import (
    angles_between,
    choose_layers,
    record_states,
)
from worker.models.architectures import layer_counts

ROWS = [
    Example((5, 6, 7, 8, 9 + i, 10, 11)[: 4 + i], ((2, 4),), source_ids=(20, 21 + i, 22))
    for i in range(4)
]
FAMILIES = distilled("causal")
CAUSAL_ROWS = [Example(row.token_ids, row.spans) for row in ROWS]


def test_recorded_states_are_those_of_transformers(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir)
    (states,) = record_states(model, CAUSAL_ROWS)
    expected = []
    for row in CAUSAL_ROWS:
        ids = torch.tensor([row.token_ids[:-1]])
        expected.append(model(input_ids=ids, output_hidden_states=True).hidden_states)
    assert len(states) == len(expected[0])
    for i, state in enumerate(states[:-1]):  # transformers applies the final norm to the last one
        theirs = torch.cat([hidden[i][0, 1:] for hidden in expected])  # without the first token
        # packed attention sums in another order
        torch.testing.assert_close(sorted_rows(state), sorted_rows(theirs), rtol=1e-4, atol=5e-5)
    last = model.model.norm(states[-1])
    theirs = torch.cat([hidden[-1][0, 1:] for hidden in expected])
    torch.testing.assert_close(sorted_rows(last), sorted_rows(theirs), rtol=1e-4, atol=5e-5)


def sorted_rows(states: torch.Tensor) -> torch.Tensor:
    """The positions in an order of their own, because batches may pack them."""
    return states[states[:, 0].argsort()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_causal_family_is_recorded(family: str, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path, family))
    (states,) = record_states(model, CAUSAL_ROWS)
    assert len(states) == layer_counts(model.config)[1] + 1
    assert all(state.isfinite().all() for state in states)


def test_both_stacks_of_an_encoder_decoder_are_recorded(tiny_t5_dir: Path) -> None:
    model = load_model(tiny_t5_dir)
    encoder, decoder = record_states(model, ROWS)
    assert len(encoder) == model.config.num_layers + 1
    assert len(decoder) == model.config.num_decoder_layers + 1
    assert len(encoder[0]) == sum(len(row.source_ids) for row in ROWS)


def test_states_that_would_take_too_much_memory_come_from_fewer_rows(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.distill.training.layer_choice.MOST_BYTES", 1)
    (states,) = record_states(load_model(tiny_llama_dir), CAUSAL_ROWS)
    assert len(states[0]) == CAUSAL_ROWS[0].num_tokens - 2  # the first and the last token


def test_angles_are_those_of_single_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(5, 7, generator=generator) for _ in range(4)]
    angles = angles_between(states)
    for i, j in combinations(range(4), 2):
        cosines = torch.cosine_similarity(states[i], states[j], dim=1)
        assert angles[i][j] == pytest.approx(float(cosines.arccos().mean()) / math.pi, rel=1e-5)


def test_opposite_states_are_half_a_turn_apart() -> None:
    state = torch.tensor([[1.0, 2.0]])
    assert angles_between([state, 3 * state, -state])[0] == pytest.approx([0, 0, 1], abs=1e-3)


@pytest.mark.parametrize(
    ("num_kept", "expected"),
    [(1, (0,)), (2, (0, 3)), (3, (0, 1, 3)), (4, (0, 1, 2, 3))],
)
def test_the_dropped_block_has_the_smallest_angle(num_kept: int, expected: tuple[int, ...]) -> None:
    angles = [
        [0.0, 0.9, 0.9, 0.9, 0.9],
        [0.0, 0.0, 0.5, 0.2, 0.4],
        [0.0, 0.0, 0.0, 0.1, 0.9],
        [0.0, 0.0, 0.0, 0.0, 0.9],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    assert choose_layers(angles, num_kept) == expected


def test_layers_that_only_lengthen_the_states_are_dropped() -> None:
    states: list[Any] = [torch.tensor([[1.0, 0.0, 0.0]])]
    for step in ((0, 1, 0), (1, 1, 0), (2, 2, 0), (0, 0, 4)):
        states.append(states[-1] + torch.tensor([step]))
    assert choose_layers(angles_between(states), 2) == (0, 3)
