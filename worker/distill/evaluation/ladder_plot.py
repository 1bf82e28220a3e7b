"""Plots a ladder's quality and speed over student size, and writes the same data as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from app.contracts.distillation import Gate

CHOSEN, PASSED, FAILED, TEACHER = "#c8501e", "#2b5f8a", "#6f7981", "#4a4a4a"


@dataclass(frozen=True)
class StudentPoint:
    """One student of a ladder, or its teacher.

    `figures` is its public entry (worker.distill.evaluation.report).
    """

    label: str
    figures: Mapping[str, Any]  # Any: open-ended JSON
    passed: bool = True
    is_chosen: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel of the plot. `scale` multiplies the metric, and `most` is its upper limit."""

    metric: str
    title: str
    axis: str
    scale: float = 1.0
    most: float = 1.0


PANELS = (
    Panel("kl", "Distance from the teacher (lower is better)", "KL, nats per token", most=math.inf),
    Panel("perplexity", "Held-out perplexity (lower is better)", "perplexity", most=math.inf),
    Panel("agreement", "Same most likely token (higher is better)", "agreement, %", 100.0),
    Panel("rouge_l", "Overlap with the teacher (higher is better)", "ROUGE-L"),
    Panel("accuracy", "Correct labels (higher is better)", "accuracy, %", 100.0),
    Panel(
        "tokens_per_second",
        "Speed, one request (higher is better)",
        "tokens per second",
        most=math.inf,
    ),
)


def write_ladder(
    points: Sequence[StudentPoint], teacher: StudentPoint, out: Path, gate: Gate | None = None
) -> tuple[Path, Path]:
    """Writes `ladder.png` and `ladder.json` into `out`, and returns their paths."""
    points = sorted(points, key=lambda point: float(point.figures["num_parameters"]))
    out.mkdir(parents=True, exist_ok=True)
    png_path, json_path = out / "ladder.png", out / "ladder.json"
    block = None if gate is None else gate.model_dump()
    fields = {
        "teacher": asdict(teacher),
        "students": [asdict(point) for point in points],
        "gate": block,
    }
    json_path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    figure = draw_ladder(points, teacher, gate)
    FigureCanvasAgg(figure)  # a canvas of its own, because pyplot keeps global state
    figure.savefig(png_path)
    return png_path, json_path


def draw_ladder(
    points: Sequence[StudentPoint], teacher: StudentPoint, gate: Gate | None = None
) -> Figure:
    """Returns a plot with a panel per metric, over the size of the students.

    A horizontal line shows the teacher. Perplexity is drawn only if no student has a KL.
    """
    there = {metric for point in points for metric in point.figures}
    panels = [
        panel
        for panel in PANELS
        if panel.metric in there - ({"perplexity"} if "kl" in there else set())
    ]
    num_columns = 2 if len(panels) > 1 else 1
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(
        figsize=(5.2 * num_columns, 0.8 + 3.3 * num_rows), dpi=120, layout="constrained"
    )
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for panel, axes in zip(panels, grid, strict=False):
        _draw_panel(axes, panel, points, teacher, gate)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.legend(handles=_legend(points, gate), loc="outside lower center", ncols=5, frameon=False)
    chosen = [point.label for point in points if point.is_chosen]
    figure.suptitle(f"Students of {teacher.label}, chosen: {chosen[0] if chosen else 'none'}")
    return figure


def _draw_panel(
    axes: Axes,
    panel: Panel,
    points: Sequence[StudentPoint],
    teacher: StudentPoint,
    gate: Gate | None,
) -> None:
    have = [point for point in points if panel.metric in point.figures]
    sizes = [point.figures["num_parameters"] / 1e6 for point in have]
    values = [panel.scale * point.figures[panel.metric] for point in have]
    axes.plot(sizes, values, color="#c9d1d8", linewidth=1.2, zorder=1)
    for point, x, y in zip(have, sizes, values, strict=True):
        _draw_point(axes, panel, point, x, y)
    if panel.metric in teacher.figures:
        axes.axhline(
            panel.scale * teacher.figures[panel.metric], color=TEACHER, linestyle="--", linewidth=1
        )
    if gate is not None and gate.metric == panel.metric:
        bound = gate.at_least if gate.at_least is not None else gate.at_most
        assert bound is not None
        axes.axhline(panel.scale * bound, color=CHOSEN, linestyle=":", linewidth=1.2)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel(panel.axis)
    axes.margins(x=0.12, y=0.16)
    # The axis ends near the metric's limits. A small margin keeps the teacher's line off the
    # border.
    bottom, top = axes.get_ylim()
    top = min(top, 1.04 * panel.scale * panel.most)
    axes.set_ylim(bottom=max(bottom, -0.04 * top), top=top)
    axes.grid(visible=True, color="#eceff1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_point(axes: Axes, panel: Panel, point: StudentPoint, x: float, y: float) -> None:
    color = CHOSEN if point.is_chosen else PASSED if point.passed else FAILED
    interval = point.figures.get("intervals", {}).get(panel.metric)
    low, high = (y, y) if interval is None else (panel.scale * bound for bound in interval)
    if interval is not None:
        # a percentile interval may not contain the value itself
        sides = [[max(0.0, y - low)], [max(0.0, high - y)]]
        axes.errorbar(x, y, yerr=sides, color=color, capsize=3, zorder=2)
    axes.plot(
        x,
        y,
        linestyle="",
        zorder=3,
        **_marker(color, is_filled=point.passed, is_chosen=point.is_chosen),
    )
    label = axes.annotate(
        point.label,
        (x, max(y, high)),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
    )
    label.set(color=color, zorder=4, path_effects=[withStroke(linewidth=3, foreground="white")])


# Any: keyword arguments of matplotlib
def _marker(color: str, *, is_filled: bool, is_chosen: bool) -> dict[str, Any]:
    return {
        "marker": "D" if is_chosen else "o",
        "markersize": 8 if is_chosen else 6.5,
        "markeredgecolor": color,
        "markerfacecolor": color if is_filled else "white",
        "color": color,
    }


def _legend(points: Sequence[StudentPoint], gate: Gate | None) -> list[Line2D]:
    """Returns handles for what the plot contains."""
    handles = [Line2D([], [], color=TEACHER, linestyle="--", label="teacher")]
    if gate is not None:
        handles.append(Line2D([], [], color=CHOSEN, linestyle=":", label="gate"))
    kinds = (
        ("chosen", CHOSEN, True, True),
        ("passes" if gate is not None else "student", PASSED, True, False),
        ("fails", FAILED, False, False),
    )
    for label, color, is_passed, is_chosen in kinds:
        if any((point.is_chosen, point.passed) == (is_chosen, is_passed) for point in points):
            marker = _marker(color, is_filled=is_passed, is_chosen=is_chosen)
            handles.append(Line2D([], [], linestyle="", label=label, **marker))
    return handles
