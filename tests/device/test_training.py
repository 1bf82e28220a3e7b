"""The trainer on a pretended GPU: devices, dtypes, and waits of the host."""

from collections.abc import Callable
from typing import Any

import pytest

Json = dict[str, Any]  # Any: open-ended JSON
Observed = Callable[[str], Json]
LINEAR_LAYERS = 7 * 2  # of the student, which has two layers
STEPS = ("training_step", "seq2seq_step", "cached_step", "lora_step", "accumulated_step")


@pytest.mark.parametrize("case", STEPS)
def test_a_training_step_waits_for_the_gpu_once(observed: Observed, case: str) -> None:
    (wait,) = observed(case)["waits"]
    assert "step_gradients.py" in wait  # where the statistics of the step are read


def test_rows_for_the_cache_are_copied_once_per_micro_batch(observed: Observed) -> None:
    seen = observed("storing_step")
    *copies, figures = seen["waits"]
    assert len(copies) == seen["num_pieces"]
    assert all("cached_teacher.py" in wait for wait in copies)
    assert "step_gradients.py" in figures


def test_layers_are_trained_in_bfloat16_with_float32_weights(observed: Observed) -> None:
    seen = observed("training_step")
    assert seen["parameter_dtypes"] == ["torch.float32"]
    # forward, and the gradients of weights and inputs
    assert seen["matmul_dtypes"]["torch.bfloat16"] >= 3 * LINEAR_LAYERS


@pytest.mark.parametrize("case", STEPS)
def test_student_and_optimizer_are_on_the_gpu(observed: Observed, case: str) -> None:
    seen = observed(case)
    assert seen["num_trained"] > 0
    assert seen["parameter_devices"] == seen["optimizer_devices"] == ["cuda"]


def test_gradients_are_accumulated_over_micro_batches(observed: Observed) -> None:
    assert observed("accumulated_step")["num_pieces"] > 1


def test_an_evaluation_runs_under_the_autocast_of_the_training(observed: Observed) -> None:
    seen = observed("evaluation")
    assert seen["matmul_dtypes"].get("torch.float32", 0) == seen["num_head_matmuls"]


def test_an_evaluation_reads_its_result_once(observed: Observed) -> None:
    (wait,) = observed("evaluation")["waits"]
    assert "held_out.py" in wait


def test_a_resumed_optimizer_is_on_the_device_of_its_parameters(observed: Observed) -> None:
    """Fused AdamW refuses a step that is on the CPU. Fake tensors without dimensions hide that."""
    seen = observed("resume")
    assert seen["devices"] == {"step": ["cuda"], "exp_avg": ["cuda"], "exp_avg_sq": ["cuda"]}


def test_activation_checkpointing_runs_all_but_the_last_layer_again(observed: Observed) -> None:
    seen = observed("activation_checkpointing")
    # PyTorch stops before the last matmul of the layer, whose result is not needed
    assert seen["checkpointed"] == seen["plain"] + LINEAR_LAYERS / 2 - 1


def test_the_switch_of_transformers_has_no_effect(observed: Observed) -> None:
    """If this fails, it works in eval mode now, and could replace our own."""
    seen = observed("activation_checkpointing")
    assert seen["switch_of_transformers"] == seen["plain"]
