import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from PIL import Image

from app.contracts.distillation import Gate
from worker.distill.evaluation.ladder_plot import (
    CHOSEN,
    FAILED,
    TEACHER,
    StudentPoint,
    draw_ladder,
    write_ladder,
)


def figures(
    num_parameters: int, kl: float, agreement: float, **more: Any
) -> dict[str, Any]:  # Any: JSON
    intervals = {"kl": [kl - 0.1, kl + 0.2], "agreement": [agreement, agreement]}
    fields = {"num_parameters": num_parameters, "weights_bytes": 4 * num_parameters, "kl": kl}
    return {**fields, "agreement": agreement, "intervals": intervals, **more}


TEACHER_POINT = StudentPoint("the teacher", figures(9_000_000, 0.0, 1.0, tokens_per_second=20.0))
POINTS = [
    StudentPoint("4 layers", figures(4_000_000, 1.0, 0.7, tokens_per_second=40.0), is_chosen=True),
    StudentPoint("2 layers", figures(2_000_000, 2.0, 0.5, tokens_per_second=80.0), passed=False),
]
GATE = Gate(metric="agreement", at_least=0.6)


def position(line: Line2D) -> tuple[float, float]:
    x, y = np.asarray(line.get_xydata())[0]
    return float(x), float(y)


def test_the_same_ladder_is_a_picture_and_json(tmp_path: Path) -> None:
    png_path, json_path = write_ladder(POINTS, TEACHER_POINT, tmp_path / "out", GATE)
    with Image.open(png_path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(2**20) or []) > 10  # something is drawn
    read = json.loads(json_path.read_text())
    assert [student["label"] for student in read["students"]] == ["2 layers", "4 layers"]
    assert [student["is_chosen"] for student in read["students"]] == [False, True]
    assert read["students"][0]["figures"] == POINTS[1].figures
    assert read["teacher"]["label"] == "the teacher"
    assert read["gate"]["at_least"] == 0.6


def test_a_panel_shows_points_intervals_teacher_and_gate() -> None:
    kl, agreement, speed, unused = draw_ladder(POINTS, TEACHER_POINT, GATE).axes
    assert kl.get_ylabel() == "KL, nats per token"
    assert kl.get_xlabel() == "parameters, millions"
    points = [line for line in kl.lines if line.get_marker() in ("o", "D")]
    assert [position(line) for line in points] == [(4.0, 1.0), (2.0, 2.0)]
    assert [line.get_color() for line in points] == [CHOSEN, FAILED]
    bars = [bar.get_segments()[0] for bar in kl.collections if isinstance(bar, LineCollection)]
    assert [(bar[0][1], bar[1][1]) for bar in bars] == [(0.9, 1.2), (1.9, 2.2)]
    across = {
        line.get_color(): position(line)[1]
        for line in agreement.lines
        if line.get_marker() == "None"
    }
    assert (across[TEACHER], across[CHOSEN]) == (100.0, 60.0)
    assert len(speed.collections) == 0  # a speed has no interval
    assert not unused.get_visible()


def test_a_metric_that_no_student_has_gets_no_panel() -> None:
    titles = [
        axes.get_title() for axes in draw_ladder(POINTS, TEACHER_POINT).axes if axes.get_visible()
    ]
    assert len(titles) == 3
    assert not any("Overlap" in title for title in titles)


def test_perplexity_stands_in_for_a_kl_that_there_is_not() -> None:
    with_both = StudentPoint("2 layers", figures(2_000_000, 2.0, 0.5, perplexity=9.0))
    without_kl = StudentPoint("2 layers", {"num_parameters": 2_000_000, "perplexity": 9.0})
    labels = [
        [
            axes.get_ylabel()
            for axes in draw_ladder([point], TEACHER_POINT).axes
            if axes.get_visible()
        ]
        for point in (with_both, without_kl)
    ]
    assert labels == [["KL, nats per token", "agreement, %"], ["perplexity"]]
