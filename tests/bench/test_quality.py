"""The planning of a training that is to fit in a given time."""

import pytest

from bench.quality import steps_within

PACE = {"fit": 3.0, "filling": 2.0, "full": 1.0, "num_batches": 10}


@pytest.mark.parametrize(("seconds", "steps"), [(0.5, 2), (12.0, 4), (23.0, 10), (28.0, 15)])
def test_steps_of_the_first_epoch_take_longer(seconds: float, steps: int) -> None:
    assert steps_within(seconds, PACE) == steps
