"""Trends of sampled figures: a slope per hour with its 95% confidence interval.

Samples follow each other closely and so are correlated, and a few are outliers (a figure sampled while a job ran).
The time after the warm-up is therefore cut into equal blocks, each block is reduced to the median of its samples,
and a line is fitted to the medians by ordinary least squares; the interval is Student's.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WARM_UP: Final = 1 / 3  # share of the time that is left out: caches fill, allocators reserve
NUM_BLOCKS: Final = 20
MIN_BLOCKS: Final = 4
CONFIDENCE: Final = 0.95
HOUR_SECONDS: Final = 3600.0

Point = tuple[float, float]  # seconds since the start, value


@dataclass(frozen=True)
class Trend:
    """A straight line through one figure; `slope`, `low` and `high` are per hour."""

    first: float
    last: float
    slope: float
    low: float
    high: float

    def grows(self, tolerance: float) -> bool:
        """Whether the lower bound of the slope is above the tolerance, both per hour."""
        return self.low > tolerance


def fit(
    points: Sequence[Point], *, warm_up: float = WARM_UP, num_blocks: int = NUM_BLOCKS
) -> Trend | None:
    """Returns the trend of the samples after the warm-up; None if they fill fewer than MIN_BLOCKS blocks."""
    if not points:
        return None
    end = points[-1][0]
    blocks = block_medians(points, end * warm_up, end, num_blocks)
    if len(blocks) < MIN_BLOCKS:
        return None
    times, values = zip(*blocks, strict=True)
    slope, intercept = statistics.linear_regression(times, values)
    errors = [value - intercept - slope * time for time, value in blocks]
    spread = sum((time - statistics.fmean(times)) ** 2 for time in times)
    degrees = len(blocks) - 2
    standard_error = math.sqrt(sum(error**2 for error in errors) / degrees / spread)
    margin = student_quantile((1 + CONFIDENCE) / 2, degrees) * standard_error
    bounds = (HOUR_SECONDS * bound for bound in (slope, slope - margin, slope + margin))
    return Trend(values[0], values[-1], *bounds)


def block_medians(
    points: Sequence[Point], begin: float, end: float, num_blocks: int
) -> list[Point]:
    """The median time and value of each block between `begin` and `end`; blocks without samples are left out."""
    blocks: list[list[Point]] = [[] for _ in range(num_blocks)]
    for time, value in points:
        if begin <= time <= end:
            number = int((time - begin) / max(end - begin, 1e-9) * num_blocks)
            blocks[min(number, num_blocks - 1)].append((time, value))
    return [
        (
            statistics.median(time for time, _ in block),
            statistics.median(value for _, value in block),
        )
        for block in blocks
        if block
    ]


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, from the normal one.

    Source: Abramowitz and Stegun (1964), 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / float(degrees) ** power for power, term in enumerate(terms))
