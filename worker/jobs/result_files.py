"""Result files of a finished job: the files that the run names, and its metrics as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from app.contracts.messages import ArtifactRef
from app.db.schema.ids import new_id
from app.db.schema.tables import Metric
from app.storage import StorageError, store

FileColumns = dict[str, Any]  # Any: columns of File, by name

PURPOSE: Final = "fine-tune-results"
STEP_METRICS_CSV: Final = "step_metrics.csv"  # in OpenAI's format, and first in the list
METRICS_CSV: Final = "metrics.csv"
# OpenAI's column names, and our series for each, in the order of preference. Agreement is with the
# teacher's prediction, while OpenAI's accuracy is with the token of the row.
OPENAI_COLUMNS: Final = {
    "train_loss": ("train_loss",),
    "train_accuracy": ("train_mean_token_accuracy", "train_agreement"),
    "valid_loss": ("valid_loss",),
    "valid_mean_token_accuracy": ("valid_mean_token_accuracy", "valid_agreement"),
}


def metrics_csv(series: Iterable[Metric], *, has_all: bool = True) -> str:
    """Returns the metrics as CSV, with one line per step.

    OpenAI's columns come first, then, with `has_all`, all other series by name. Missing values are
    empty.
    """
    steps: dict[int, dict[str, float]] = {}
    for point in series:
        steps.setdefault(point.step, {})[point.name] = point.value
    names = sorted({name for values in steps.values() for name in values} - set(OPENAI_COLUMNS))
    names = names if has_all else []
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["step", *OPENAI_COLUMNS, *names])
    for step, values in sorted(steps.items()):
        theirs = [
            next((values[name] for name in (column, *ours) if name in values), "")
            for column, ours in OPENAI_COLUMNS.items()
        ]
        if has_all or any(value != "" for value in theirs):
            table.writerow([step, *theirs, *(values.get(name, "") for name in names)])
    return lines.getvalue()


def upload_results(
    folder: Path, names: Sequence[str], series: Iterable[Metric]
) -> list[FileColumns]:
    """Stores the metrics and the named files of the run's folder; returns the File rows to insert.

    If no row is inserted for a stored file, the garbage collector deletes it later.
    Raises StorageError if a name is not a regular file of the folder, or cannot be stored.
    """
    points = list(series)
    (folder / STEP_METRICS_CSV).write_text(metrics_csv(points, has_all=False))
    (folder / METRICS_CSV).write_text(metrics_csv(points))
    rows = []
    for name in (STEP_METRICS_CSV, METRICS_CSV, *names):
        path = folder / name
        if (
            path.is_symlink()
            or not path.is_file()
            or not path.resolve().is_relative_to(folder.resolve())
        ):
            raise StorageError(
                f"the run names the result file {name!r}, which is not a file in its folder"
            )
        file_id = new_id("file-")
        ref: ArtifactRef = store().put_file(path, f"files/{file_id}")
        rows.append(
            {
                "id": file_id,
                "filename": path.name[:255],
                "purpose": PURPOSE,
                "bytes": ref.bytes,
                "sha256": ref.sha256,
                "store_key": ref.key,
            }
        )
    return rows
