"""Files about a ladder of students: a table and a plot."""

from pathlib import Path

from app.contracts.distillation import Distillation
from worker.distill.missing_results import MissingPart, attempt
from worker.distill.student_sweep import Entry, SelectedStudent
from worker.protocol.run_lines import Sink


def ladder_files(
    selected: SelectedStudent, block: Distillation, out: Path, result: Entry, sink: Sink
) -> tuple[str, ...]:
    """Adds the ladder, if any, to the result, and returns the names of its files."""
    if not block.student.ladder:
        return ()
    result["ladder"] = selected.ladder
    files = attempt("ladder_plot", "plot_failed", lambda: draw_ladder(selected, block, out))
    if not isinstance(files, MissingPart):
        return files
    sink(files.event("the student is registered without it"))
    result["missing"] = [*result.get("missing", []), files.model_dump()]
    return ()


def draw_ladder(selected: SelectedStudent, block: Distillation, out: Path) -> tuple[str, ...]:
    """Draws the ladder into a folder, and returns the names of the files."""
    # imports matplotlib, which few jobs need
    from worker.distill.evaluation.ladder_plot import StudentPoint, write_ladder

    points = [
        StudentPoint(entry["label"], entry.get("test", entry), entry["passed"], entry["chosen"])
        for entry in selected.ladder
    ]
    teacher = StudentPoint(block.teacher, selected.result.get("teacher", {}))
    paths = write_ladder(points, teacher, out, block.evaluation.gate)
    return tuple(path.name for path in paths)
