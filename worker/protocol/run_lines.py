"""Lines that a run process writes to its standard output for the supervisor.

Each line is one JSON object.
"""

import math
import os
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, TextIO

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.contracts.datasets import Side

StageName = Literal[
    "loading_models",
    "generating_teacher_data",
    "storing_teacher_outputs",
    "adapting_teacher",
    "training",
    "evaluating",
    "exporting",
    "fetching",
    "unpacking",
    "converting",
    "reading",
    "deduplicating",
    "writing",
]

PROGRESS_SECONDS = 1.0


class Line(BaseModel):
    """Base class of all lines."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageLine(Line):
    """A stage begins, and the previous one has ended."""

    type: Literal["stage"] = "stage"
    name: StageName


class ProgressLine(Line):
    """Progress of the run.

    `percent` refers to the whole run, `step` and `total_steps` to the training.
    """

    type: Literal["progress"] = "progress"
    percent: float
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    tokens_per_second: float | None = None
    seconds_remaining: float | None = None
    rows_done: int | None = None
    rows_total: int | None = None


class MetricsLine(Line):
    """Metric values at a step, such as train_loss, learning_rate, grad_norm or valid_kl."""

    type: Literal["metrics"] = "metrics"
    step: int
    total_steps: int | None = None
    values: dict[str, float]

    def with_speed(self, progress: Mapping[str, Any]) -> dict[str, float]:  # Any: JSON numbers
        """Returns the values. Those of a training step also have the training speed, if known."""
        speed = progress.get("tokens_per_second")
        if not speed or "train_loss" not in self.values:
            return self.values
        return {**self.values, "tokens_per_second": float(speed)}


class CheckpointLine(Line):
    """A complete, fsynced checkpoint is in `folder`, relative to the run's output folder.

    `metrics` holds the evaluation at this step, if there was one, and the last averages of the
    training metrics.
    """

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    folder: str
    is_best: bool
    metrics: dict[str, float]


class MessageLine(Line):
    """A message for the job's event history."""

    type: Literal["message"] = "message"
    level: Literal["info", "warn"] = "info"
    message: str
    data: dict[str, Any] = {}  # Any: free-form detail for the event


class ResultLine(Line):
    """The run has succeeded. The model is in `folder`, relative to the run's output folder."""

    type: Literal["result"] = "result"
    folder: str
    facts: dict[str, Any]  # Any: ModelFacts of the student, as JSON
    result: dict[str, Any]  # Any: the public result object
    trained_tokens: int = 0
    # Result files for the job's owner, relative to the run's output folder.
    files: tuple[str, ...] = ()


class DatasetFile(Line):
    """File of a data set, relative to the run's output folder."""

    side: Side
    name: str
    num_rows: int
    max_row_bytes: int


class DatasetLine(Line):
    """The run has made a data set. `report` says how its rows were chosen."""

    type: Literal["dataset"] = "dataset"
    files: tuple[DatasetFile, ...]
    report: dict[str, Any]  # Any: the public report


class StoppedLine(Line):
    """The run has stopped after a SIGTERM. A later run can resume from its newest checkpoint."""

    type: Literal["stopped"] = "stopped"
    step: int


class ErrorLine(Line):
    """The run has failed permanently: a retry would fail too."""

    type: Literal["error"] = "error"
    code: str
    message: str
    param: str | None = None


RunLine = Annotated[
    StageLine
    | ProgressLine
    | MetricsLine
    | CheckpointLine
    | MessageLine
    | ResultLine
    | DatasetLine
    | StoppedLine
    | ErrorLine,
    Field(discriminator="type"),
]
run_line: TypeAdapter[RunLine] = TypeAdapter(RunLine)


class Sink(Protocol):
    """Callable that takes the lines of a run. A run process writes them to its standard output."""

    def __call__(self, line: RunLine, /) -> None: ...


def take_over_stdout() -> TextIO:
    """Returns a stream for the lines, and redirects all other output to standard error.

    Libraries print to standard output, which is reserved for the lines of a run process.
    """
    lines = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return lines


class Throttle:
    """Limits progress lines to one per `PROGRESS_SECONDS`."""

    def __init__(self) -> None:
        self._told = -math.inf

    def is_due(self) -> bool:
        if time.monotonic() - self._told < PROGRESS_SECONDS:
            return False
        self._told = time.monotonic()
        return True
