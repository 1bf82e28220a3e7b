"""Estimates of time, compared for one process and for several that share each batch."""

import pytest

from app.contracts.job_seconds import (
    LAYER_CALL_SECONDS,
    OPTIMIZER_PARAMETERS,
    STEP_SECONDS,
    Phase,
    reference_seconds,
)
from tests.app.contracts.test_job_memory import NUM_PARAMETERS, ROWS, planned


def seconds(num_processes: int) -> dict[Phase, float]:
    return reference_seconds(planned(), ROWS, has_bfloat16=True, num_processes=num_processes)


def test_devices_divide_the_passes_of_the_training_and_not_its_updates() -> None:
    per_step = NUM_PARAMETERS / OPTIMIZER_PARAMETERS + 4 * LAYER_CALL_SECONDS + STEP_SECONDS
    updates = ROWS.num_steps * per_step
    one, four = seconds(1), seconds(4)
    assert four["training"] - updates == pytest.approx((one["training"] - updates) / 4)
    for phase in ("start", "layer_fit", "saving"):
        assert four[phase] == one[phase]


def test_devices_divide_the_evaluations_during_the_training_and_not_the_report() -> None:
    found = {number: seconds(number)["evaluation"] for number in (1, 2, 4)}
    during = 2 * (found[1] - found[2])
    assert 0 < during < found[1]
    assert found[4] == pytest.approx(found[1] - during + during / 4)
