"""Bootstrap confidence intervals of held-out metrics, and of the difference of two models.

Groups of rows are resampled, not tokens or single rows. The tokens of a row are not independent,
and neither are rows that share a question. So a figure is a function of the number of times that
each row is drawn. With one seed, two figures of the same rows see the same draws, so that their
difference is a paired one.

D draws, R rows, G groups.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13 (percentile
intervals);
Cameron, Gelbach and Miller, Review of Economics and Statistics 90(3) (2008), section III.A (pairs
cluster bootstrap).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]
NUM_DRAWS = 1000
BLOCK_COUNTS = 2**22  # draws times rows per block: 32 MiB
MAX_LOG = 700.0  # larger exponents overflow a float64


@dataclass(frozen=True)
class Figure:
    """A statistic of R rows.

    `of` returns its value for each draw [D], from the number of times that each row was drawn [D,
    R]. `groups` has the number of each row's group, from 0 without gaps. None makes each row a
    group of its own.
    """

    num_rows: int
    of: Callable[[Array], Array]
    groups: tuple[int, ...] | None = None

    @property
    def value(self) -> float:
        """The value on the rows themselves, each drawn once."""
        return float(self.of(np.ones((1, self.num_rows)))[0])

    def interval(
        self, *, seed: int = 0, num_draws: int = NUM_DRAWS, confidence: float = 0.95
    ) -> Interval:
        """Returns the percentile bootstrap interval."""
        tail = 50 * (1 - confidence)
        groups_R = np.arange(self.num_rows) if self.groups is None else np.asarray(self.groups)
        drawn_D = np.concatenate(
            [self.of(counts_DR) for counts_DR in _draws(groups_R, num_draws, seed)]
        )
        low, high = np.percentile(drawn_D, [tail, 100 - tail])
        return float(low), float(high)

    def minus(self, other: "Figure") -> "Figure":
        """Returns the difference of two figures of the same rows."""
        assert (self.num_rows, self.groups) == (other.num_rows, other.groups)
        return replace(self, of=lambda counts_DR: self.of(counts_DR) - other.of(counts_DR))

    def grouped(self, groups: Sequence[int] | None) -> "Figure":
        """Returns the same figure with these groups of rows. The groups may have any numbers."""
        if groups is None:
            return self
        assert len(groups) == self.num_rows
        numbers: dict[int, int] = {}
        return replace(
            self, groups=tuple(numbers.setdefault(group, len(numbers)) for group in groups)
        )


def mean(values: ArrayLike, weights: ArrayLike | None = None) -> Figure:
    """Returns the sum of the rows' values over the sum of their weights, which are 1 by default.

    For a mean over tokens, the values are the rows' sums, and the weights are their numbers of
    tokens.
    """
    values_R = np.asarray(values, dtype=np.float64)
    weights_R = np.ones_like(values_R) if weights is None else np.asarray(weights, dtype=np.float64)
    assert values_R.shape == weights_R.shape
    assert (weights_R > 0).all()
    return Figure(len(values_R), lambda counts_DR: (counts_DR @ values_R) / (counts_DR @ weights_R))


def exponential(figure: Figure) -> Figure:
    """Returns the exponential of a figure, such as the perplexity of a mean cross-entropy.

    The exponent is capped, so that an untrained student does not overflow the report.
    """
    return replace(figure, of=lambda counts_DR: np.exp(np.minimum(figure.of(counts_DR), MAX_LOG)))


def macro_f1(predicted: Sequence[str], actual: Sequence[str], classes: Sequence[str]) -> Figure:
    """Returns the mean of 2 TP / (2 TP + FP + FN) over the classes.

    Only classes that occur as targets in the draw count. If none does, the result is 0.
    """
    is_predicted_RC = _one_hot(predicted, classes)
    is_actual_RC = _one_hot(actual, classes)

    def of(counts_DR: Array) -> Array:
        """Returns the macro-F1 of each draw."""
        hits_DC = counts_DR @ (is_predicted_RC * is_actual_RC)
        actual_DC = counts_DR @ is_actual_RC
        # a class without targets has no hits and adds nothing; the 1 avoids 0/0
        f1_DC = 2 * hits_DC / np.maximum(counts_DR @ is_predicted_RC + actual_DC, 1)
        return np.asarray(f1_DC.sum(axis=1) / np.maximum((actual_DC > 0).sum(axis=1), 1))

    return Figure(len(actual), of)


def _one_hot(labels: Sequence[str], classes: Sequence[str]) -> Array:
    return np.array([[label == name for name in classes] for label in labels], dtype=np.float64)


def _draws(groups_R: NDArray[np.int64], num_draws: int, seed: int) -> Iterator[Array]:
    """Yields how often each row occurs in each draw of G groups, in blocks of draws.

    The same groups and seed give the same draws.
    """
    random = np.random.default_rng(seed)
    num_groups = int(groups_R.max()) + 1
    shares_G = np.full(num_groups, 1 / num_groups)
    block = max(1, BLOCK_COUNTS // len(groups_R))
    for start in range(0, num_draws, block):
        counts_DG = random.multinomial(num_groups, shares_G, size=min(block, num_draws - start))
        yield counts_DG[:, groups_R].astype(np.float64)
