"""The trainer on a pretended GPU: devices, dtypes, and waits of the host."""

from collections.abc import Callable
from typing import Any

Json = dict[str, Any]  # Any: open-ended JSON
Observed = Callable[[str], Json]
LINEAR_LAYERS = 7 * 2  # of the student, which has two layers


def test_a_training_step_waits_for_the_gpu_at_most_once(observed: Observed) -> None:
    (wait,) = observed("training_step")["waits"]
    assert "step_gradients.py" in wait  # where the statistics of the step are read


def test_layers_are_trained_in_bfloat16_with_float32_weights(observed: Observed) -> None:
    seen = observed("training_step")
    assert seen["parameter_dtypes"] == ["torch.float32"]
    # forward, and the gradients of weights and inputs
    assert seen["matmul_dtypes"]["torch.bfloat16"] >= 3 * LINEAR_LAYERS


def test_student_and_optimizer_are_on_the_gpu(observed: Observed) -> None:
    seen = observed("training_step")
    assert seen["parameter_devices"] == seen["optimizer_devices"] == ["cuda"]


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
