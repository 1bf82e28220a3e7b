"""On-policy training and the decoder of the serving engine on a pretended GPU."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.device.sizes import NUM_ANSWER_TOKENS

Json = dict[str, Any]  # Any: open-ended JSON
Observed = Callable[[str], Json]
SAMPLERS = ("greedy", "sampled", "top_p", "top_k", "processed", "logprobs")


def test_rollouts_wait_once_per_token(observed: Observed) -> None:
    seen = observed("on_policy_step")
    assert seen["are_rollouts"]
    assert len(seen["waits_of_generation"]) == NUM_ANSWER_TOKENS


def test_a_step_on_rollouts_waits_once(observed: Observed) -> None:
    (wait,) = observed("on_policy_step")["waits_of_step"]
    assert "step_gradients.py" in wait


def test_the_loss_of_two_tokenizers_does_not_wait(observed: Observed) -> None:
    assert observed("two_tokenizers")["waits"] == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_decode_step_waits_for_its_tokens_only(observed: Observed, sampler: str) -> None:
    """Log-probabilities are a second read, because they are those of the raw logits."""
    seen = observed("decoding")[sampler]
    num_reads = 2 if sampler == "logprobs" else 1
    assert len(seen["step_waits"]) == len(seen["prefill_waits"]) == num_reads
    assert all("sampling.py" in wait for wait in seen["step_waits"] + seen["prefill_waits"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_decode_step_repeats_no_keys(observed: Observed, sampler: str) -> None:
    assert not observed("decoding")[sampler]["has_repeated_keys"]


def test_the_window_of_a_decode_step_is_padded_to_a_bucket(observed: Observed) -> None:
    seen = observed("decoding")["greedy"]
    assert seen["num_running"] == 3
    assert 0 <= seen["num_columns"] - seen["num_used"] < seen["bucket"]
    assert seen["num_columns"] % seen["bucket"] == 0


def test_decoding_runs_in_the_dtype_of_the_weights(observed: Observed) -> None:
    seen = observed("decoding")["greedy"]
    assert seen["cache"] == ["torch.bfloat16", "cuda"]
    assert set(seen["matmul_dtypes"]) == {"torch.bfloat16"}
