"""Progress of a training job: a bar on a terminal, and otherwise a line now and then.

`stillhouse jobs watch` and `stillhouse demo` both use it.
"""

import time
from collections.abc import Callable
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from app.commands.progress_lines import ENDED, LINE_SECONDS, ProgressLines, clock
from app.commands.shell import Json, escaped

POLL_SECONDS: Final = 1.0
# what the counter of rows counts, by stage; in other stages its last value is not shown
ROW_UNITS: Final = {"generating_teacher_data": "answers", "storing_teacher_outputs": "rows"}


def watch_job(
    load: Callable[[], Json], console: Console, *, line_seconds: float = LINE_SECONDS
) -> Json:
    """Shows the progress of a job until it has ended or is paused, and returns the job.

    `load` returns the job as the API shows it. A line is printed for each stage. In addition, a
    terminal shows a bar, and elsewhere a line is printed every `line_seconds` seconds.
    """
    lines = ProgressLines(console, line_seconds)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("queued", total=100, detail="")
        shown_stage, begun = "", set[tuple[str, float]]()
        while True:
            job = load()
            stage = stage_of(job)
            for name, at in missed_stages(job, begun):
                _announce(console, lines, name, name, at=at)
            if stage != shown_stage:
                _announce(console, lines, stage, progress_line(job))
            shown_stage = stage
            bar.update(
                task, description=escaped(stage), completed=percent_of(job), detail=detail(job)
            )
            lines.tell(progress_line(job))
            if job["status"] in ENDED or job["status"] == "paused":
                return job
            time.sleep(POLL_SECONDS)


def missed_stages(job: Json, begun: set[tuple[str, float]]) -> list[tuple[str, float]]:
    """Returns the stages that have begun and ended since the last call, with their begin.

    `begun` holds all stages of the last call, and receives the new ones.
    """
    missed = []
    for stage in job.get("stages") or ():
        key = (stage["name"].replace("_", " "), stage["started_at"])
        if key not in begun and stage["status"] != "running":
            missed.append(key)
        begun.add(key)
    return missed


def _announce(
    console: Console, lines: ProgressLines, stage: str, line: str, *, at: float | None = None
) -> None:
    """Prints the stage above the progress bar, or the line if there is no terminal."""
    if console.is_terminal:
        console.print(Text.assemble((clock(at), "dim"), f"  {escaped(stage)}"))
    lines.tell(line, is_due=True, at=at)


def stage_of(job: Json) -> str:
    """Returns the stage of a running job in words, or the status of another job."""
    stage = job.get("stage") if job["status"] == "running" else None
    return str(stage or job["status"]).replace("_", " ")


def percent_of(job: Json) -> float:
    """Returns how much of the job is done, from 0 to 100."""
    done = 100.0 if job["status"] == "succeeded" else (job["progress"] or {}).get("percent")
    return float(done or 0.0)


def progress_line(job: Json) -> str:
    """Returns the job's stage, percentage and counters as one line of text."""
    parts = (stage_of(job), f"{percent_of(job):.0f}%", detail(job))
    return "  ".join(part for part in parts if part)


def detail(job: Json) -> str:
    """Returns the job's place in the queue, or its counters, metrics and remaining time."""
    place = job.get("queue")
    if place:
        return f"place {place['position']} of {place['depth']}"
    if job["status"] != "running":
        return ""
    progress, metrics = job["progress"] or {}, job["latest_metrics"] or {}
    parts = []
    if progress.get("rows_total") and (unit := ROW_UNITS.get(str(job.get("stage")))):
        parts.append(f"{progress.get('rows_done') or 0}/{progress['rows_total']} {unit}")
    if progress.get("total_steps"):
        parts.append(f"step {progress.get('step') or 0}/{progress['total_steps']}")
    if metrics.get("train_loss") is not None:
        parts.append(f"loss {metrics['train_loss']:.2f}")
    if metrics.get("valid_kl") is not None:
        parts.append(f"held-out KL {metrics['valid_kl']:.2f}")
    elif metrics.get("valid_loss") is not None:
        parts.append(f"held-out loss {metrics['valid_loss']:.2f}")
    if progress.get("seconds_remaining") is not None:
        parts.append(f"{duration(progress['seconds_remaining'])} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Returns a duration as text, such as 42 s, 4 min 10 s or 3 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
