"""The statistics of the soak: slopes and intervals are those of the data, and a verdict follows from them."""

import random

import pytest

from tests.soak.trend import fit, student_quantile

MINUTE = 60.0


def points(
    slope_per_hour: float, *, noise: float = 0.0, seed: int = 0
) -> list[tuple[float, float]]:
    """An hour of samples, one each 5 seconds."""
    rng = random.Random(seed)
    times = [5.0 * number for number in range(720)]
    return [(at, 100.0 + slope_per_hour * at / 3600 + rng.gauss(0.0, noise)) for at in times]


def test_the_slope_of_a_line_is_found_with_an_interval_of_no_width() -> None:
    trend = fit(points(12.0))
    assert trend is not None
    assert (trend.slope, trend.low, trend.high) == pytest.approx((12.0, 12.0, 12.0))


def test_the_interval_holds_the_true_slope_about_as_often_as_it_says() -> None:
    trends = [fit(points(3.0, noise=5.0, seed=seed)) for seed in range(400)]
    num_held = sum(trend.low <= 3.0 <= trend.high for trend in trends if trend is not None)
    assert 0.91 < num_held / 400 < 0.985


def test_growth_is_told_from_noise() -> None:
    growing, level = fit(points(60.0, noise=5.0)), fit(points(0.0, noise=5.0))
    assert growing is not None
    assert level is not None
    assert growing.grows(10.0)
    assert not level.grows(10.0)
    assert not growing.grows(100.0)


def test_growth_while_it_warms_up_is_left_out() -> None:
    warming = [(at, min(at, 15 * MINUTE)) for at, _ in points(0.0)]
    trend = fit(warming)
    assert trend is not None
    assert trend.slope == pytest.approx(0.0)


def test_a_few_outliers_do_not_bend_the_line() -> None:
    spoiled = points(0.0)
    for i in range(650, 720, 10):
        spoiled[i] = (spoiled[i][0], 10_000.0)
    trend = fit(spoiled)
    assert trend is not None
    assert trend.slope == pytest.approx(0.0)


def test_too_few_samples_have_no_trend() -> None:
    assert fit([]) is None
    assert fit([(0.0, 1.0), (5.0, 1.0), (10.0, 1.0)]) is None


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(2, 4.303), (5, 2.571), (18, 2.101), (1000, 1.962)]
)
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, rel=0.02)
