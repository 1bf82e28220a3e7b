"""Feature losses and rollouts in the estimates of GPU memory. tests/device compares them with traces."""

from typing import Any

import pytest

from app.contracts.distillation import Distillation, HiddenTerm
from app.contracts.job_memory import device_bytes
from app.contracts.memory.step_parts import (
    NO_PARTS,
    RolloutSizes,
    StepParts,
    planned_parts,
    rollout_bytes,
)
from app.contracts.run_limits import MAX_RUNNING
from tests.app.contracts.test_job_memory import ROWS, TINY, planned


def block(hyperparameters: dict[str, Any] | None = None, **more: Any) -> Distillation:
    return Distillation.model_validate(
        {"teacher": "t", "hyperparameters": hyperparameters or {}, **more}
    )


def test_most_jobs_have_neither_part() -> None:
    assert planned_parts(block(), signal="logits") == NO_PARTS


def test_the_signal_hidden_compares_hidden_states() -> None:
    assert planned_parts(block(), signal="hidden") == StepParts(HiddenTerm())
    attention: dict[str, Any] = {"attention": {}}
    parts = planned_parts(block(objective=attention), signal="hidden")
    assert parts.hidden is None
    assert parts.attention is not None


STUDENT = {"completions": "student", "max_new_tokens": 100}


@pytest.mark.parametrize(
    ("hyperparameters", "longest_tokens", "sizes"),
    [
        # the prompts have at most 2,048 tokens, and the cache has up to twice as many rows
        ({"batch_tokens": 2048}, None, (MAX_RUNNING, 2 * 2048 // MAX_RUNNING + 100)),
        ({"batch_tokens": "auto"}, None, (MAX_RUNNING, 2 * 8192 // MAX_RUNNING + 100)),
        ({"batch_tokens": 2048, "max_sequence_tokens": 120}, None, (MAX_RUNNING, 120)),
        ({"batch_tokens": 8192}, 20, (MAX_RUNNING, 120)),
        ({"batch_rows": 4, "max_sequence_tokens": 512}, None, (4, 512)),
    ],
)
def test_the_largest_rollouts_follow_from_the_batch(
    hyperparameters: dict[str, Any], longest_tokens: int | None, sizes: tuple[int, int]
) -> None:
    parts = planned_parts(block(hyperparameters, data=STUDENT), longest_tokens=longest_tokens)
    assert parts.rollouts == RolloutSizes(*sizes)


def test_the_cache_of_rollouts_has_a_power_of_two_of_rows() -> None:
    def cache(num_sequences: int) -> int:
        long, short = (
            rollout_bytes(TINY, RolloutSizes(num_sequences, length)) for length in (20_000, 10_000)
        )
        return long - short

    # keys and values of 4 layers, each with 4 float32 values per token, and a copied prompt
    assert [cache(number) // (10_000 * 2 * 4 * 4 * 4) for number in (1, 5, 16, 17)] == [
        2,
        9,
        17,
        33,
    ]


def test_feature_losses_and_rollouts_count_on_a_gpu() -> None:
    plain = device_bytes(planned(), ROWS, has_bfloat16=True)
    features: dict[str, Any] = {"hidden": {}}
    assert device_bytes(planned(objective=features), ROWS, has_bfloat16=True) > plain
    assert device_bytes(planned(data=STUDENT), ROWS, has_bfloat16=True) > plain
