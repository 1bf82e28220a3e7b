"""Plots accuracy over requests per second, one point per model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples.licences.measure import Score

TEACHER, STUDENT, TEXT = "#4a4a4a", "#2b5f8a", "#333333"


@dataclass(frozen=True)
class Point:
    """One model."""

    label: str
    requests_per_second: float
    accuracy: Score
    is_teacher: bool = False


def draw(points: Sequence[Point], path: Path) -> None:
    """Writes the plot. The vertical lines are 95% intervals."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for point in points:
        value, color = 100 * point.accuracy.value, TEACHER if point.is_teacher else STUDENT
        below, above = value - 100 * point.accuracy.low, 100 * point.accuracy.high - value
        axes.errorbar(
            point.requests_per_second,
            value,
            yerr=[[below], [above]],
            fmt="s" if point.is_teacher else "o",
            color=color,
            elinewidth=1,
            capsize=3,
        )
        axes.annotate(
            point.label,
            (point.requests_per_second, value),
            xytext=(7, 4),
            textcoords="offset points",
            color=TEXT,
            fontsize=9,
        )
    axes.set_xlabel("requests per second, 16 callers over HTTP on two cores")
    axes.set_ylabel("accuracy on 1,000 test notices, %")
    axes.set_title("Licence notices: accuracy and speed", loc="left", fontsize=11)
    axes.margins(x=0.18, y=0.12)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
