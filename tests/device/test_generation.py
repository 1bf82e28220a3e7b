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
    assert "host_copies.py" in wait


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


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_graph_has_no_wait_and_no_operation_of_the_cpu(observed: Observed, family: str) -> None:
    """What runs on the CPU is not part of a graph, so that replays would use old results."""
    seen = observed("graphs")[family]
    assert seen["num_recorded"] > 0
    assert seen["waits"] == []
    assert seen["cpu_ops"] == []
    assert min(seen["num_ops"]) > 20


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_steps_with_graphs_are_replays_that_wait_once(observed: Observed, family: str) -> None:
    """The first step of a shape is plain. The second one is recorded and replayed."""
    seen = observed("graphs")[family]
    assert seen["step_waits"] == [1] * len(seen["step_waits"])
    assert seen["num_replays"] == len(seen["step_waits"]) - seen["num_recorded"]
    assert seen["is_counted"]


@pytest.mark.parametrize("prompts", ["one", "padded"])
def test_the_estimated_memory_of_a_prefill_covers_a_trace(observed: Observed, prompts: str) -> None:
    seen = observed("prefill_memory")[prompts]
    assert 0.5 * seen["estimated"] < seen["traced"] <= seen["estimated"]
