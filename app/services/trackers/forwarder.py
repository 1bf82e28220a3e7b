"""Sends the metrics of jobs to one experiment tracker, batch by batch.

Metrics are read from the database, so training never waits for a tracker.
"""

import threading
from collections.abc import Callable
from typing import Any, Final

import structlog

from app.contracts.messages import DistillationJob
from app.contracts.trackers import Delivery, Json, RunEnd, TrackerDown, TrackerName
from app.crash_points import crash_point
from app.db.schema.tables import Job
from app.db.session import DatabaseUnavailable, PoolExhausted, transaction
from app.db.trackers.runs import Claim, claim, finish_batch, postpone_batch
from app.services.trackers.mlflow_runs import MlflowRuns
from app.services.trackers.tensorboard_files import TensorboardFiles
from app.services.trackers.wandb_runs import WandbRuns
from app.settings import Settings

log = structlog.get_logger(__name__)
JOIN_SECONDS: Final = 10.0
MAX_FIGURES: Final = 200
# Time between two batches of a run. A batch for Weights & Biases starts a process.
BATCH_SECONDS: Final[dict[TrackerName, float]] = {"wandb": 30.0, "mlflow": 5.0, "tensorboard": 5.0}

Deliver = Callable[[Delivery], Json]


class Forwarder:
    """Sends what is due to one tracker. Several processes can run one each at the same time."""

    def __init__(self, tracker: TrackerName, deliver: Deliver) -> None:
        self._tracker = tracker
        self._deliver = deliver

    def step(self) -> bool:
        """Sends one batch and returns whether there was one.

        Raises DatabaseUnavailable or PoolExhausted. The batch is then sent again later.
        """
        wait_seconds = BATCH_SECONDS[self._tracker]
        with transaction() as session:
            claimed = claim(session, self._tracker, wait_seconds)
        if claimed is None:
            return False
        is_first_failure = claimed.run.num_failures == 0  # since the last success of this run
        try:
            state = self._deliver(delivery_of(claimed))
        except TrackerDown as fault:
            reason: str | None = str(fault)
        except Exception:
            # For example, a library of another version. Other runs must not wait for this one.
            if is_first_failure:
                log.exception("tracker_failed", tracker=self._tracker, job=claimed.job.id)
            reason = "internal error"
        else:
            reason = None
        crash_point("tracker.sent")
        with transaction() as session:
            if reason is None:
                finish_batch(session, claimed, state, wait_seconds)
            else:
                postpone_batch(session, claimed, reason)
        if reason is not None and is_first_failure:
            log.warning("tracker_down", tracker=self._tracker, job=claimed.job.id, reason=reason)
        return True


class ForwarderThread(threading.Thread):
    """Background thread of the API process that runs a forwarder every few seconds."""

    def __init__(self, tracker: TrackerName, deliver: Deliver, every_seconds: float) -> None:
        super().__init__(name=f"tracker-{tracker}", daemon=True)
        self._forwarder = Forwarder(tracker, deliver)
        self._every_seconds = every_seconds
        self._is_stopping = threading.Event()
        self._is_database_away = False

    def run(self) -> None:
        while not self._is_stopping.wait(self._every_seconds):
            try:
                while not self._is_stopping.is_set() and self._forwarder.step():
                    pass
            except (DatabaseUnavailable, PoolExhausted) as fault:
                if not self._is_database_away:  # so that an outage is logged once
                    log.warning("tracker_postponed", reason=type(fault).__name__)
                self._is_database_away = True
                continue
            except Exception:
                log.exception("tracker_failed")  # the thread must keep running
            self._is_database_away = False

    def stop(self) -> None:
        """Ends the thread after the batch that is being sent, if that is soon."""
        self._is_stopping.set()
        self.join(JOIN_SECONDS)


def forwarder_threads(settings: Settings) -> list[ForwarderThread]:
    """Returns the threads for the trackers that are configured."""
    delivers: dict[TrackerName, Deliver] = {
        "tensorboard": TensorboardFiles(settings.tensorboard_root()).deliver
    }
    if settings.mlflow_tracking_uri:
        delivers["mlflow"] = MlflowRuns(settings.mlflow_tracking_uri).deliver
    if settings.wandb_api_key:
        delivers["wandb"] = WandbRuns(settings).deliver
    every_seconds = settings.reconcile_seconds
    return [ForwarderThread(name, deliver, every_seconds) for name, deliver in delivers.items()]


def delivery_of(claimed: Claim) -> Delivery:
    """Returns what a tracker gets for a batch."""
    job, run = claimed.job, claimed.run
    end = None
    if claimed.is_end and job.finished_at is not None:
        end = RunEnd(
            status=job.status,
            fine_tuned_model=job.result_model_id,
            figures=dict(_figures("result", job.result or {})[:MAX_FIGURES]),
            finished_at=job.finished_at.timestamp(),
            last_step=max(run.sent.values(), default=0),
        )
    return Delivery(
        job_id=job.id,
        created_at=job.created_at.timestamp(),
        options=run.options,
        state=run.state,
        config=_config(job),
        points=claimed.points,
        end=end,
    )


def _config(job: Job) -> Json:
    """Returns the inputs and the hyperparameters of a job that have a value."""
    spec = DistillationJob.model_validate(job.spec)
    inputs = {
        "job": job.id,
        "method": spec.method,
        "model": job.request.get("model"),
        "teacher": spec.distillation.teacher if spec.method == "distillation" else None,
        "training_file": job.training_file_id,
        "validation_file": job.validation_file_id,
        "seed": spec.seed,
    }
    options = spec.distillation.hyperparameters.model_dump(mode="json")
    return {name: value for name, value in (inputs | options).items() if value is not None}


def _figures(name: str, value: Any) -> list[tuple[str, float]]:  # Any: open-ended JSON
    """Returns the numbers in a JSON object, with the path to each."""
    if isinstance(value, dict):
        return [pair for key in value for pair in _figures(f"{name}/{key}", value[key])]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [(name, float(value))] if is_number else []
