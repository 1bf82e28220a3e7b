"""Times are scaled by finished jobs, or else by the speed of a matmul."""

import pytest

from app.contracts.job_seconds import PHASES, REFERENCE_FLOPS, VERSION
from app.contracts.train_workers import MachineProfile
from app.db.estimates.job_costs import JobCost
from app.services.estimates.speed import speed_of

PROFILE = MachineProfile(device="cpu", flops=REFERENCE_FLOPS / 2, has_bfloat16=True)


def cost(
    factor: float,
    kind: str = "distillation layers",
    version: int = VERSION,
    *,
    has_bfloat16: bool = False,
) -> JobCost:
    reference = {str(phase): 0.0 if phase == "layer_fit" else 10.0 for phase in PHASES}
    return JobCost(
        kind=kind,
        version=version,
        seconds={phase: factor * seconds for phase, seconds in reference.items()},
        reference_seconds=reference,
        has_bfloat16=has_bfloat16,
        device="cpu",
        teacher="t",
        answer_tokens=None,
    )


def test_nothing_measured_gives_no_speed() -> None:
    assert speed_of([], [], kind="distillation layers") is None


def test_a_matmul_counts_until_a_job_has_finished() -> None:
    measured = speed_of([], [PROFILE], kind="distillation layers")
    assert measured is not None
    assert measured.factors["training"] == pytest.approx(2.0)
    finished = speed_of([cost(3.0)], [PROFILE], kind="distillation layers")
    assert finished is not None
    assert finished.factors["training"] == pytest.approx(3.0)


@pytest.mark.parametrize(("has_bfloat16", "factor"), [(True, 2.0), (False, 1.0)])
def test_a_matmul_is_compared_with_one_of_the_same_dtype(
    *, has_bfloat16: bool, factor: float
) -> None:
    """The reference machine needs twice the time in float32, so a speed of half is as fast there."""
    profile = PROFILE.model_copy(update={"has_bfloat16": has_bfloat16})
    measured = speed_of([], [profile], kind="distillation layers")
    assert measured is not None
    assert measured.has_bfloat16 is has_bfloat16
    assert measured.factors["training"] == pytest.approx(factor)


def test_one_job_in_float32_does_not_hide_bfloat16() -> None:
    newest, older = cost(2.0), cost(2.0, has_bfloat16=True)
    for costs, profiles, expected in (
        ([newest], [], False),
        ([newest, older], [], True),
        ([newest], [PROFILE], True),
    ):
        found = speed_of(costs, profiles, kind="distillation layers")
        assert found is not None
        assert found.has_bfloat16 is expected


def test_jobs_of_the_same_kind_count_before_others() -> None:
    costs = [cost(9.0, kind="supervised lora"), cost(2.0), cost(3.0), cost(4.0)]
    same = speed_of(costs, [], kind="distillation layers")
    other = speed_of(costs[:1], [], kind="distillation layers")
    assert same is not None
    assert other is not None
    assert same.factors["teacher"] == pytest.approx(3.0)
    assert other.factors["teacher"] == pytest.approx(9.0)
    assert "of other kinds" in other.note


def test_a_phase_that_no_job_had_gets_the_factor_of_the_whole_job() -> None:
    found = speed_of([cost(2.0)], [], kind="distillation layers")
    assert found is not None
    assert found.factors["layer_fit"] == pytest.approx(2.0)


def test_jobs_on_another_device_do_not_count() -> None:
    assert speed_of([cost(2.0)], [], kind="distillation layers", device="cuda") is None


def test_figures_of_other_versions_are_not_compared() -> None:
    assert speed_of([cost(2.0, version=VERSION + 1)], [], kind="distillation layers") is None
