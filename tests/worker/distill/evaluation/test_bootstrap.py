import math
from collections.abc import Sequence

import numpy as np
import pytest

from worker.distill.evaluation.bootstrap import Figure, exponential, macro_f1, mean

VALUES = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
TOKENS = [2, 1, 5, 3, 4, 1]


def slow_draws(num_rows: int, seed: int, num_draws: int) -> list[list[int]]:
    """The numbers of the rows in each draw, one by one."""
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(num_draws):
        counts = random.multinomial(num_rows, [1 / num_rows] * num_rows)
        draws.append([row for row in range(num_rows) for _ in range(counts[row])])
    return draws


def slow_mean(rows: Sequence[int], values: Sequence[float] = VALUES) -> float:
    return sum(values[row] for row in rows) / sum(TOKENS[row] for row in rows)


def test_an_interval_is_that_of_a_loop_over_draws_and_rows() -> None:
    found = mean(VALUES, TOKENS).interval(seed=3, num_draws=200)
    expected = [slow_mean(rows) for rows in slow_draws(6, 3, 200)]
    assert found == pytest.approx(np.percentile(expected, [2.5, 97.5]))


def slow_group_draws(groups: Sequence[int], seed: int, num_draws: int) -> list[list[int]]:
    """The numbers of the rows in each draw: all rows of one drawn group after the other."""
    names = list(dict.fromkeys(groups))
    return [
        [row for place in draw for row, group in enumerate(groups) if group == names[place]]
        for draw in slow_draws(len(names), seed, num_draws)
    ]


def test_an_interval_over_groups_is_that_of_a_loop_over_draws_groups_and_rows() -> None:
    groups = [7, 3, 7, 9, 3, 3]
    found = mean(VALUES, TOKENS).grouped(groups).interval(seed=3, num_draws=200)
    expected = [slow_mean(rows) for rows in slow_group_draws(groups, 3, 200)]
    assert found == pytest.approx(np.percentile(expected, [2.5, 97.5]))


def test_groups_of_one_row_change_nothing() -> None:
    assert mean(VALUES, TOKENS).grouped(range(6)).interval() == mean(VALUES, TOKENS).interval()


def test_a_difference_and_an_exponential_keep_the_groups() -> None:
    groups = [0, 0, 1, 1, 2, 2]
    figure = mean(VALUES, TOKENS).grouped(groups)
    other = mean([2.0, 1.0, 3.5, 1.0, 6.0, 2.0], TOKENS).grouped(groups)
    assert exponential(figure).groups == figure.minus(other).groups == tuple(groups)
    with pytest.raises(AssertionError):
        figure.minus(mean(VALUES, TOKENS))


def test_a_difference_is_of_the_same_rows_in_both() -> None:
    others = [2.0, 1.0, 3.5, 1.0, 6.0, 2.0]
    found = mean(VALUES, TOKENS).minus(mean(others, TOKENS))
    expected = [slow_mean(rows) - slow_mean(rows, others) for rows in slow_draws(6, 0, 200)]
    assert found.value == pytest.approx((sum(VALUES) - sum(others)) / 16)
    assert found.interval(num_draws=200) == pytest.approx(np.percentile(expected, [2.5, 97.5]))


def test_a_constant_difference_is_certain_however_much_the_rows_vary() -> None:
    low, high = (
        mean([v + t / 4 for v, t in zip(VALUES, TOKENS, strict=True)], TOKENS)
        .minus(mean(VALUES, TOKENS))
        .interval()
    )
    assert (low, high) == pytest.approx((0.25, 0.25))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mean(VALUES, TOKENS).interval()
    monkeypatch.setattr("worker.distill.evaluation.bootstrap.BLOCK_COUNTS", 6 * 7)
    assert mean(VALUES, TOKENS).interval() == whole


def test_a_figures_value_is_of_the_rows_as_they_are() -> None:
    assert mean(VALUES, TOKENS).value == pytest.approx(sum(VALUES) / sum(TOKENS))
    assert mean([True, False, True, True]).value == 0.75
    assert exponential(mean(VALUES, TOKENS)).value == pytest.approx(
        math.exp(sum(VALUES) / sum(TOKENS))
    )


def test_a_perplexity_beyond_floats_is_capped() -> None:
    figure = exponential(mean([2000.0, 1000.0]))
    assert math.isfinite(figure.value)
    assert all(math.isfinite(bound) for bound in figure.interval())


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Rows of unequal length whose tokens share a level of their own; the true token mean is 2."""
    random = np.random.default_rng(7)
    num_covered = 0
    for _ in range(200):
        tokens_R = random.integers(5, 40, size=60)
        sums_R = tokens_R * random.gamma(4.0, 0.5, size=60)
        low, high = mean(sums_R, tokens_R).interval()
        num_covered += low <= 2.0 <= high
    assert 0.90 <= num_covered / 200 <= 0.98


def test_only_intervals_over_groups_cover_the_truth_where_rows_share_a_question() -> None:
    """Forty questions of five rows each, whose values share a level; the true mean is 2."""
    random = np.random.default_rng(8)
    groups = np.repeat(np.arange(40), 5)
    num_covered = {"groups": 0, "rows": 0}
    for _ in range(200):
        figure = mean(random.gamma(4.0, 0.5, size=40)[groups] + random.normal(0.0, 0.1, size=200))
        for name, of in (("groups", figure.grouped(list(groups))), ("rows", figure)):
            low, high = of.interval(num_draws=400)
            num_covered[name] += low <= 2.0 <= high
    assert 0.89 <= num_covered["groups"] / 200 <= 0.98
    assert num_covered["rows"] / 200 < 0.75


def slow_macro_f1(predicted: Sequence[str], actual: Sequence[str]) -> float:
    scores = []
    for name in sorted(set(actual)):
        tp = sum(p == a == name for p, a in zip(predicted, actual, strict=True))
        fp = sum(p == name != a for p, a in zip(predicted, actual, strict=True))
        fn = sum(a == name != p for p, a in zip(predicted, actual, strict=True))
        scores.append(2 * tp / (2 * tp + fp + fn))
    return sum(scores) / len(scores)


def test_macro_f1_is_that_of_a_loop_in_every_draw() -> None:
    actual = ["a", "a", "b", "b", "b", "c", "c", "a"]
    predicted = ["a", "b", "b", "", "b", "a", "c", "a"]
    figure = macro_f1(predicted, actual, ("a", "b", "c"))
    assert figure.value == pytest.approx(slow_macro_f1(predicted, actual))
    expected = [
        slow_macro_f1([predicted[row] for row in rows], [actual[row] for row in rows])
        for rows in slow_draws(8, 0, 300)
    ]
    assert figure.interval(num_draws=300) == pytest.approx(np.percentile(expected, [2.5, 97.5]))


def test_figures_of_different_rows_have_no_difference() -> None:
    with pytest.raises(AssertionError):
        Figure.minus(mean([1.0, 2.0]), mean([1.0]))
