"""Layer fitting, layer choice, feature losses and teacher adaptation on a pretended GPU."""

from collections.abc import Callable
from typing import Any

import pytest

Json = dict[str, Any]  # Any: open-ended JSON
Observed = Callable[[str], Json]
FITS = ("layer_fit", "seq2seq_layer_fit", "layer_fit_from_the_cpu")
FEATURE_STEPS = ("feature_step", "seq2seq_feature_step", "masked_feature_step")


@pytest.mark.parametrize("case", ["layer_fit", "seq2seq_layer_fit"])
def test_a_layer_fit_waits_once_per_model(observed: Observed, case: str) -> None:
    """It reads whether the layers only add to the residual stream."""
    waits = observed(case)["waits"]
    assert len(waits) == 2
    assert all("layer_fitting.py" in wait for wait in waits)


def test_a_start_model_on_the_cpu_adds_no_waits(observed: Observed) -> None:
    (wait,) = observed("layer_fit_from_the_cpu")["waits"]
    assert "layer_fitting.py" in wait


@pytest.mark.parametrize("case", FITS)
def test_layers_are_fitted_on_the_gpu_in_the_students_dtype(observed: Observed, case: str) -> None:
    seen = observed(case)
    assert seen["num_fitted"] > 0
    assert seen["solved_on"] == seen["parameter_devices"] == ["cuda"]
    assert seen["parameter_dtypes"] == ["torch.float32"]


def test_the_start_model_is_bfloat16(observed: Observed) -> None:
    assert observed("layer_fit")["matmul_dtypes"]["torch.bfloat16"] > 0
    assert "torch.bfloat16" not in observed("layer_fit_from_the_cpu")["matmul_dtypes"]


def test_a_layer_choice_waits_once(observed: Observed) -> None:
    (wait,) = observed("layer_choice")["waits"]
    assert "layer_choice.py" in wait


@pytest.mark.parametrize("case", FEATURE_STEPS)
def test_a_step_with_feature_losses_waits_once(observed: Observed, case: str) -> None:
    (wait,) = observed(case)["waits"]
    assert "step_gradients.py" in wait


def test_a_step_of_the_teacher_adaptation_does_not_wait(observed: Observed) -> None:
    assert observed("adaptation")["waits_of_a_step"] == []


def test_an_adapted_teacher_has_float32_weights_under_autocast(observed: Observed) -> None:
    seen = observed("adaptation")
    assert seen["matmul_dtypes"]["torch.bfloat16"] > 0
    assert seen["parameters"] == ["torch.float32 on cuda"]
