"""The line of text that says how far a job is."""

from typing import Any

import pytest

from app.commands.remote.job_progress import progress_line


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("generating_teacher_data", "generating teacher data  30%  8/64 answers"),
        ("storing_teacher_outputs", "storing teacher outputs  30%  8/64 rows"),
        ("training", "training  30%"),
    ],
)
def test_counts_have_the_unit_of_their_stage(stage: str, line: str) -> None:
    job: dict[str, Any] = {  # Any: the body of a job
        "status": "running",
        "stage": stage,
        "progress": {"percent": 30, "rows_done": 8, "rows_total": 64},
        "latest_metrics": None,
    }
    assert progress_line(job) == line
