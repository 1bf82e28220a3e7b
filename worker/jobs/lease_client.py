"""Database operations of the supervisor for the job it has leased. Each call is one transaction.

A call raises LeaseLost if the lease is no longer valid. The caller then kills the run and writes
nothing more. Calls are retried after short database outages. If the answer to a COMMIT was lost,
the retry recognises that the attempt has already ended, and does not end it twice.
"""

import functools
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

from pydantic import TypeAdapter, ValidationError

from app.contracts.datasets import DatasetJob
from app.contracts.messages import (
    AnyJob,
    ArtifactRef,
    DistillationJob,
    ImportJob,
    JobFailure,
    JobSpec,
    JobStatus,
    ModelFacts,
)
from app.crash_points import crash_point
from app.db import checkpoints, jobs, leases, reconciliation
from app.db.job_states import add_event, begin_stage
from app.db.registry.lineage import Origin, origin_of
from app.db.schema.tables import Checkpoint, Job, Metric
from app.db.session import DatabaseUnavailable, Session, transaction
from app.settings import get_settings
from worker.protocol.run_lines import MessageLine, MetricsLine, ProgressLine, RunLine, StageLine

NUM_TRIES: Final = 3
MOST_POINTS: Final = 2_000_000  # limit on the points of a job's metrics in its result file
job_spec: Final[TypeAdapter[AnyJob]] = TypeAdapter(JobSpec)
P = ParamSpec("P")
R = TypeVar("R")


class LeaseLost(Exception):
    """The job has ended, or its lease has expired or belongs to another worker."""


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint that a run can resume from."""

    id: str
    step: int
    store_key: str
    manifest_sha256: str
    bytes: int

    @property
    def artifact(self) -> ArtifactRef:
        return ArtifactRef(key=self.store_key, bytes=self.bytes, sha256=self.manifest_sha256)


@dataclass(frozen=True)
class Lease:
    """The right to run a job, and everything that its attempt needs to know.

    `token` is the fencing token of all writes. `resume` is the checkpoint to resume from, if any.
    `traceparent` names the span of the submission, if that was traced.
    """

    job_id: str
    token: int
    attempt: int
    spec: AnyJob
    project_id: str | None
    resume: CheckpointRef | None
    traceparent: str | None = None


@dataclass(frozen=True)
class JobSignals:
    """Requests of the job's owner that the run has to follow."""

    cancel: bool
    pause: bool


def retry_on_disconnect(call: Callable[P, R]) -> Callable[P, R]:
    """Repeats a whole transaction if the database is unavailable.

    Raises DatabaseUnavailable if the last try fails too.
    """

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the transaction up to `NUM_TRIES` times."""
        for num_tried in range(1, NUM_TRIES):
            try:
                return call(*args, **kwargs)
            except DatabaseUnavailable:
                time.sleep(0.2 * num_tried * random.uniform(1.0, 2.0))
        return call(*args, **kwargs)

    return wrapped


def claim(worker_id: str) -> Lease | None:
    """Leases the next due job; returns None if no job is due.

    Jobs whose spec this version cannot read are failed and skipped.
    """
    while True:
        taken = _claim(f"{worker_id[:100]}/{secrets.token_hex(6)}")
        if taken is None or isinstance(taken, Lease):
            return taken


@retry_on_disconnect
def _claim(owner: str) -> Lease | Job | None:
    """Returns a lease, or the failed job if this version cannot read its spec, or None."""
    with transaction() as session:
        job = leases.claim(session, owner, get_settings().lease_seconds)
        if job is None:
            return None
        assert job.lease_token is not None
        try:
            spec = job_spec.validate_python(job.spec)
        except ValidationError as error:
            message = (
                f"this version cannot read the job; submit it again ({error.error_count()} errors)"
            )
            failure = JobFailure(code="invalid_spec", message=message)
            return leases.fail(session, job.id, job.lease_token, failure)
        resume = _newest(session, job.id, job.lease_token)
        crash_point("claim.inside")
        parent = job.request.get("traceparent")
        return Lease(job.id, job.lease_token, job.attempt, spec, job.project_id, resume, parent)


@retry_on_disconnect
def heartbeat(lease: Lease) -> JobSignals:
    """Renews the lease and returns the current requests of the job's owner."""
    crash_point("heartbeat.begun")
    with transaction() as session:
        job = leases.heartbeat(session, lease.job_id, lease.token, get_settings().lease_seconds)
        held = _demand(session, lease, job)
        return JobSignals(
            cancel=held.cancel_requested_at is not None, pause=held.pause_requested_at is not None
        )


@retry_on_disconnect
def record(lease: Lease, number: int, lines: Sequence[RunLine]) -> None:
    """Writes stages, progress, metrics and messages to the job; ignores other lines.

    `number` rises with each record of an attempt. A record with a number that was committed
    before changes nothing, which makes it safe to retry after a lost answer to a COMMIT.
    """
    crash_point("record.begun")
    with transaction() as session:
        job = _demand(session, lease, leases.hold(session, lease.job_id, lease.token))
        if not leases.begin_record(session, lease.token, number):
            return
        columns: dict[str, Any] = {}  # Any: columns of Job, by name
        for line in lines:
            match line:
                case StageLine():
                    columns["stage"] = line.name
                    columns["stages"] = begin_stage(columns.get("stages", job.stages), line.name)
                    add_event(
                        session,
                        job.id,
                        f"Stage: {line.name}.",
                        type="stage",
                        data={"stage": line.name},
                    )
                case ProgressLine():
                    columns["progress"] = line.model_dump(exclude={"type"}, exclude_none=True)
                case MetricsLine():
                    measured = line.with_speed(columns.get("progress", job.progress))
                    values = {"step": line.step, **measured}
                    total = {} if line.total_steps is None else {"total_steps": line.total_steps}
                    columns["latest_metrics"] = (
                        columns.get("latest_metrics", job.latest_metrics) | values
                    )
                    leases.write_metrics(session, job.id, line.step, measured)
                    add_event(session, job.id, _sentence(line), type="metrics", data=values | total)
                case MessageLine():
                    add_event(session, job.id, line.message, level=line.level, data=line.data)
        if columns:
            leases.write_progress(session, job.id, lease.token, **columns)


@retry_on_disconnect
def commit_checkpoint(
    lease: Lease, step: int, ref: ArtifactRef, metrics: dict[str, float], is_best: bool
) -> list[str]:
    """Records a stored checkpoint; returns the store keys of checkpoints that can be deleted."""
    crash_point("commit.begun")
    with transaction() as session:
        is_committed = checkpoints.insert_checkpoint(
            session, lease.job_id, lease.token, step=step, ref=ref, metrics=metrics, is_best=is_best
        )
        if not is_committed:
            raise LeaseLost(lease.job_id)
        return checkpoints.retire_checkpoints(
            session, lease.job_id, get_settings().keep_checkpoints
        )


@retry_on_disconnect
def mark_corrupt(lease: Lease, checkpoint_id: str) -> CheckpointRef | None:
    """Marks a checkpoint as corrupt; returns the next older one, or None if there is none."""
    with transaction() as session:
        if not checkpoints.mark_corrupt(session, lease.job_id, lease.token, checkpoint_id):
            raise LeaseLost(lease.job_id)
        return _newest(session, lease.job_id, lease.token)


@retry_on_disconnect
def metric_series(lease: Lease) -> list[Metric]:
    """Returns the metrics of all attempts of the job, at most `MOST_POINTS` points."""
    with transaction() as session:
        return jobs.metric_series(session, lease.job_id, most=MOST_POINTS)


@retry_on_disconnect
def origin(lease: Lease) -> Origin:
    """Returns the files and models that the job's model comes from, for its card."""
    with transaction() as session:
        job = _demand(session, lease, jobs.load_job(session, lease.job_id))
        return origin_of(session, job)


@retry_on_disconnect
def finish(
    lease: Lease,
    *,
    model_id: str,
    ref: ArtifactRef,
    facts: ModelFacts,
    result: dict[str, Any],  # Any: the public result object
    trained_tokens: int,
    files: Sequence[dict[str, Any]] = (),  # Any: columns of File
) -> bool:
    """Registers the model and the result files, and ends the job, in one transaction.

    Returns False if the job was cancelled meanwhile or the model id was taken. No row refers to
    the stored artifacts then, and the caller has to delete them.
    """
    assert not isinstance(lease.spec, DatasetJob), "a data set job makes no model"
    kind, teacher_id = registration_of(lease.spec)
    model = {
        "id": model_id,
        "origin": kind,
        "store_key": ref.key,
        "bytes": ref.bytes,
        "manifest_sha256": ref.sha256,
        "facts": facts.model_dump(mode="json"),
        "teacher_id": teacher_id,
    }
    crash_point("finish.begun")
    with transaction() as session:
        job = leases.succeed(
            session,
            lease.job_id,
            lease.token,
            model=model,
            result=result,
            trained_tokens=trained_tokens,
            files=files,
        )
        if job is None:
            return demand_outcome(session, lease, "succeeded")
        crash_point("finish.inside")
        return job.status == JobStatus.succeeded


def registration_of(spec: DistillationJob | ImportJob) -> tuple[str, str | None]:
    """Returns the origin of the model that a job makes, and its teacher if it has one."""
    if isinstance(spec, ImportJob):
        return "imported", None
    if spec.method == "supervised":
        return "fine-tuned", None
    return "distilled", spec.distillation.teacher


@retry_on_disconnect
def fail(lease: Lease, failure: JobFailure) -> None:
    """Ends the job after a permanent failure."""
    crash_point("fail.begun")
    with transaction() as session:
        if leases.fail(session, lease.job_id, lease.token, failure) is None:
            demand_outcome(session, lease, "failed")


@retry_on_disconnect
def cancelled(lease: Lease) -> None:
    """Ends the job after its run was killed for a cancellation."""
    with transaction() as session:
        if leases.cancel(session, lease.job_id, lease.token) is None:
            demand_outcome(session, lease, "cancelled")


@retry_on_disconnect
def paused(lease: Lease) -> None:
    """Pauses the job after its run has stopped for the owner's pause request."""
    with transaction() as session:
        if leases.pause(session, lease.job_id, lease.token) is None:
            demand_outcome(session, lease, "paused", "released", "cancelled")


@retry_on_disconnect
def pause_for_disk(lease: Lease, message: str) -> None:
    """Pauses the job because a disk is full. The job keeps its checkpoints.

    The owner can resume the job once there is free space. `message` is shown to the owner.
    """
    with transaction() as session:
        if leases.pause_for_disk(session, lease.job_id, lease.token, message=message) is None:
            demand_outcome(session, lease, "paused", "cancelled")


@retry_on_disconnect
def release(lease: Lease, reason: str) -> None:
    """Returns the job to the queue because the worker shuts down. This does not count as a loss."""
    with transaction() as session:
        if leases.release(session, lease.job_id, lease.token, reason=reason) is None:
            demand_outcome(session, lease, "released", "paused", "cancelled")


@retry_on_disconnect
def lost(lease: Lease, reason: str, error_code: str = "worker_lost") -> None:
    """Records a lost attempt. The job is retried after the retry policy's delay.

    After too many losses it fails with `error_code` instead.
    """
    with transaction() as session:
        policy = leases.retry_policy()
        job = leases.lose(
            session, lease.job_id, lease.token, policy, reason=reason, error_code=error_code
        )
        if job is None:
            demand_outcome(session, lease, "lost", "out_of_memory", "paused", "cancelled")


def ended(names: Sequence[str]) -> list[str]:
    """Returns the names that are ids of ended jobs. A failed job may still be resumed later."""
    with transaction() as session:
        return [
            name
            for name, job in reconciliation.stored_jobs(session, names).items()
            if job.has_ended
        ]


def _demand(session: Session, lease: Lease, job: Job | None) -> Job:
    if job is None:
        raise LeaseLost(lease.job_id)
    return job


def demand_outcome(session: Session, lease: Lease, *outcomes: str) -> bool:
    """Returns True if this attempt has already ended with one of `outcomes`.

    That happens if the answer to an earlier try of the same call was lost.
    Raises LeaseLost in all other cases.
    """
    if leases.outcome_of(session, lease.token) not in outcomes:
        raise LeaseLost(lease.job_id)
    return True


def _newest(session: Session, job_id: str, token: int) -> CheckpointRef | None:
    found: Checkpoint | None = leases.newest_checkpoint(session, job_id)
    leases.note_resumed_from(session, token, found.step if found else None)
    if found is None:
        return None
    return CheckpointRef(found.id, found.step, found.store_key, found.manifest_sha256, found.bytes)


# OpenAI's words for metrics in the messages of events, in its order.
SENTENCE = {
    "train_loss": "training loss",
    "valid_loss": "validation loss",
}


def _sentence(line: MetricsLine) -> str:
    """Returns the message of a metrics event in the words of OpenAI."""
    total = f"/{line.total_steps}" if line.total_steps is not None else ""
    values = [
        f"{words}={line.values[name]:.2f}"
        for name, words in SENTENCE.items()
        if name in line.values
    ]
    if not values:
        values = [f"{name}={value:.4g}" for name, value in sorted(line.values.items())]
    return f"Step {line.step}{total}: {', '.join(values)}"
