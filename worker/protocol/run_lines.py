"""What a run says while it works: one JSON object a line on its standard output, read by the supervisor."""

import math
import time
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

StageName = Literal[
    "loading_models",
    "generating_teacher_data",
    "adapting_teacher",
    "training",
    "evaluating",
    "exporting",
    "fetching",
    "converting",
]

PROGRESS_SECONDS = 1.0


class Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageLine(Line):
    """A stage begins (and the one before has ended)."""

    type: Literal["stage"] = "stage"
    name: StageName


class ProgressLine(Line):
    """How far the run is. percent is of the whole run, step and total_steps of the training."""

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
    """Values of series at a step: train_loss, learning_rate, grad_norm, valid_kl, valid_agreement, …"""

    type: Literal["metrics"] = "metrics"
    step: int
    values: dict[str, float]


class CheckpointLine(Line):
    """A complete, fsynced checkpoint lies in `folder` (relative to the run's output folder).

    `metrics` are those of the evaluation at this step; empty if the step was not evaluated.
    """

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    folder: str
    is_best: bool
    metrics: dict[str, float]


class MessageLine(Line):
    type: Literal["message"] = "message"
    level: Literal["info", "warn"] = "info"
    message: str
    data: dict[str, Any] = {}  # Any: free-form detail for the event


class ResultLine(Line):
    """The run has succeeded; the student lies in `folder` (relative to the run's output folder)."""

    type: Literal["result"] = "result"
    folder: str
    facts: dict[str, Any]  # Any: ModelFacts of the student, as JSON
    result: dict[str, Any]  # Any: the public result object
    trained_tokens: int = 0
    files: tuple[
        str, ...
    ] = ()  # result files for the job's owner, relative to the run's output folder


class StoppedLine(Line):
    """The run was asked to stop (SIGTERM) and has: its newest checkpoint is the place to go on from."""

    type: Literal["stopped"] = "stopped"
    step: int


class ErrorLine(Line):
    """The run has failed for a reason that trying again will not mend."""

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
    | StoppedLine
    | ErrorLine,
    Field(discriminator="type"),
]
run_line: TypeAdapter[RunLine] = TypeAdapter(RunLine)


class Sink(Protocol):
    """Takes a run's lines; the process's own writes them to its standard output."""

    def __call__(self, line: RunLine, /) -> None: ...


class Throttle:
    """Lets progress be told once a second."""

    def __init__(self) -> None:
        self._told = -math.inf

    def is_due(self) -> bool:
        if time.monotonic() - self._told < PROGRESS_SECONDS:
            return False
        self._told = time.monotonic()
        return True
