"""Experiment trackers that a job can name in `integrations`, and what is sent to them."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.contracts.distillation import NO_NUL

Json = dict[str, Any]  # Any: open-ended JSON
TrackerName = Literal["wandb", "mlflow", "tensorboard"]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=NO_NUL)]
ProjectName = Annotated[
    str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\x00]+$")
]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]
# MLflow allows these characters in the name of a tag.
MlflowKey = Annotated[
    str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_./ -]+$")
]
MlflowValue = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WandbOptions(_Options):
    """Run of Weights & Biases. `name` is the job id if it is None."""

    project: ProjectName
    name: Name | None = None
    entity: Name | None = None
    tags: Annotated[list[Tag], Field(max_length=32)] = []


class MlflowOptions(_Options):
    """Run of MLflow. `run_name` is the job id if it is None."""

    experiment: Name
    run_name: Name | None = None
    tags: Annotated[dict[MlflowKey, MlflowValue], Field(max_length=32)] = {}


class TensorboardOptions(_Options):
    """TensorBoard has no options: the event file is in a folder with the name of the job."""


class WandbIntegration(_Options):
    """Sends the metrics of a job to Weights & Biases."""

    type: Literal["wandb"]
    wandb: WandbOptions


class MlflowIntegration(_Options):
    """Sends the metrics of a job to MLflow."""

    type: Literal["mlflow"]
    mlflow: MlflowOptions


class TensorboardIntegration(_Options):
    """Writes the metrics of a job to a TensorBoard event file."""

    type: Literal["tensorboard"]
    tensorboard: TensorboardOptions = TensorboardOptions()


Integration = Annotated[
    WandbIntegration | MlflowIntegration | TensorboardIntegration, Field(discriminator="type")
]


@dataclass(frozen=True)
class MetricPoint:
    """Value of a metric at one step. `created_at` is in seconds since the epoch."""

    name: str
    step: int
    value: float
    created_at: float


@dataclass(frozen=True)
class RunEnd:
    """End of a job: its status, its model, and the numbers of its result."""

    status: str
    fine_tuned_model: str | None
    figures: dict[str, float]
    finished_at: float
    last_step: int


@dataclass(frozen=True)
class Delivery:
    """One batch of a job's metrics for one tracker.

    options: Options of the integration, as in the request.
    state: What the tracker returned for the previous batch, such as a run id; empty at first.
    config: The job's model and hyperparameters.
    end: The end of the job. Its batch has no points.
    """

    job_id: str
    created_at: float
    options: Json
    state: Json
    config: Json
    points: tuple[MetricPoint, ...]
    end: RunEnd | None = None


class TrackerDown(Exception):
    """The tracker did not accept a batch. The batch is sent again later."""
