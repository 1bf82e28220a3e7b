"""The supervisor's hand in the database: claim a job, say how it goes, end it. Each call is one transaction.

A call that finds the lease gone raises LeaseLost: kill the run and write nothing more. A database that is
away for a moment is tried again; an ending whose answer got lost is recognised and not done twice.
"""

import functools
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

from pydantic import TypeAdapter, ValidationError

from app.contracts.messages import (
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
from app.db.schema.tables import Checkpoint, Job, Metric
from app.db.session import DatabaseUnavailable, Session, transaction
from app.settings import get_settings
from worker.protocol.run_lines import MessageLine, MetricsLine, ProgressLine, RunLine, StageLine

NUM_TRIES: Final = 3
MOST_POINTS: Final = 2_000_000  # of a job's metrics in its result file
job_spec: Final[TypeAdapter[DistillationJob | ImportJob]] = TypeAdapter(JobSpec)
P = ParamSpec("P")
R = TypeVar("R")


class LeaseLost(Exception):
    """The lease is somebody else's, or the job has ended: stop, and write nothing."""


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint that a run can go on from."""

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
    """The right to run a job until it ends or another takes it."""

    job_id: str
    token: int
    attempt: int
    spec: DistillationJob | ImportJob
    project_id: str | None
    resume: CheckpointRef | None


@dataclass(frozen=True)
class JobSignals:
    """What the job's owner wants of the run."""

    cancel: bool
    pause: bool


def retry_on_disconnect(call: Callable[P, R]) -> Callable[P, R]:
    """Repeats a whole transaction when the database was away; the last failure is the caller's."""

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        for num_tried in range(1, NUM_TRIES):
            try:
                return call(*args, **kwargs)
            except DatabaseUnavailable:
                time.sleep(0.2 * num_tried * random.uniform(1.0, 2.0))
        return call(*args, **kwargs)

    return wrapped


def claim(worker_id: str) -> Lease | None:
    """The next due job with the right to run it; None if nothing is due."""
    while True:
        taken = _claim(f"{worker_id[:100]}/{secrets.token_hex(6)}")
        if taken is None or isinstance(taken, Lease):
            return taken


@retry_on_disconnect
def _claim(owner: str) -> Lease | Job | None:
    """A lease; or the job, failed, if its spec is not one that this version can run."""
    with transaction() as session:
        job = leases.claim(session, owner, get_settings().lease_seconds)
        if job is None:
            return None
        assert job.lease_token is not None
        try:
            spec = job_spec.validate_python(job.spec)
        except ValidationError as error:
            message = (
                f"this version cannot read the job; submit it again ({error.error_count()} faults)"
            )
            failure = JobFailure(code="invalid_spec", message=message)
            return leases.fail(session, job.id, job.lease_token, failure)
        resume = _newest(session, job.id, job.lease_token)
        crash_point("claim.inside")
        return Lease(job.id, job.lease_token, job.attempt, spec, job.project_id, resume)


@retry_on_disconnect
def heartbeat(lease: Lease) -> JobSignals:
    crash_point("heartbeat.begun")
    with transaction() as session:
        job = leases.heartbeat(session, lease.job_id, lease.token, get_settings().lease_seconds)
        held = _demand(session, lease, job)
        return JobSignals(
            cancel=held.cancel_requested_at is not None, pause=held.pause_requested_at is not None
        )


@retry_on_disconnect
def record(lease: Lease, number: int, lines: Sequence[RunLine]) -> None:
    """Writes stages, progress, metrics and messages into the job, its series and its history; skips other lines.

    `number` rises with each record of an attempt. A record that is repeated with its number, because the answer to
    its COMMIT was lost, changes nothing.
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
                    values = {"step": line.step, **line.values}
                    columns["latest_metrics"] = (
                        columns.get("latest_metrics", job.latest_metrics) | values
                    )
                    leases.write_metrics(session, job.id, line.step, line.values)
                    add_event(session, job.id, _sentence(line), type="metrics", data=values)
                case MessageLine():
                    add_event(session, job.id, line.message, level=line.level, data=line.data)
        if columns:
            leases.write_progress(session, job.id, lease.token, **columns)


@retry_on_disconnect
def commit_checkpoint(
    lease: Lease, step: int, ref: ArtifactRef, metrics: dict[str, float], is_best: bool
) -> list[str]:
    """Makes a stored checkpoint the job's; gives the store keys of those that nobody needs any more."""
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
    """Takes a damaged checkpoint out of use; gives the next older one, None if the run begins anew."""
    with transaction() as session:
        if not checkpoints.mark_corrupt(session, lease.job_id, lease.token, checkpoint_id):
            raise LeaseLost(lease.job_id)
        return _newest(session, lease.job_id, lease.token)


@retry_on_disconnect
def metric_series(lease: Lease) -> list[Metric]:
    """All that the job's attempts have measured."""
    with transaction() as session:
        return jobs.metric_series(session, lease.job_id, most=MOST_POINTS)


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
    """Registers the model and the result files and ends the job in one transaction.

    False: the job was cancelled meanwhile or the id was taken, nothing refers to what was stored, delete it.
    """
    model = {
        "id": model_id,
        "origin": "distilled" if isinstance(lease.spec, DistillationJob) else "imported",
        "store_key": ref.key,
        "bytes": ref.bytes,
        "manifest_sha256": ref.sha256,
        "facts": facts.model_dump(mode="json"),
        "teacher_id": lease.spec.distillation.teacher
        if isinstance(lease.spec, DistillationJob)
        else None,
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
            return _demand_outcome(session, lease, "succeeded")
        crash_point("finish.inside")
        return job.status == JobStatus.succeeded


@retry_on_disconnect
def fail(lease: Lease, failure: JobFailure) -> None:
    """Ends the job for a reason that trying again will not mend."""
    crash_point("fail.begun")
    with transaction() as session:
        if leases.fail(session, lease.job_id, lease.token, failure) is None:
            _demand_outcome(session, lease, "failed")


@retry_on_disconnect
def cancelled(lease: Lease) -> None:
    with transaction() as session:
        if leases.cancel(session, lease.job_id, lease.token) is None:
            _demand_outcome(session, lease, "cancelled")


@retry_on_disconnect
def paused(lease: Lease) -> None:
    """The run has stopped at a checkpoint because its owner wanted a pause."""
    with transaction() as session:
        if leases.pause(session, lease.job_id, lease.token) is None:
            _demand_outcome(session, lease, "paused", "released", "cancelled")


@retry_on_disconnect
def pause_for_disk(lease: Lease, message: str) -> None:
    """The run cannot go on for want of something that its owner can give: it waits, and keeps its checkpoints."""
    with transaction() as session:
        if leases.pause_for_disk(session, lease.job_id, lease.token, message=message) is None:
            _demand_outcome(session, lease, "paused", "cancelled")


@retry_on_disconnect
def release(lease: Lease, reason: str) -> None:
    """The worker leaves: the job goes back to the queue, and no loss is counted."""
    with transaction() as session:
        if leases.release(session, lease.job_id, lease.token, reason=reason) is None:
            _demand_outcome(session, lease, "released", "paused", "cancelled")


@retry_on_disconnect
def lost(lease: Lease, reason: str, error_code: str = "worker_lost") -> None:
    """The run died under us: it is tried again, or the job fails with `error_code` after too many losses."""
    settings = get_settings()
    retry_policy = leases.RetryPolicy(settings.max_losses, settings.retry_backoff_seconds)
    with transaction() as session:
        job = leases.lose(
            session, lease.job_id, lease.token, retry_policy, reason=reason, error_code=error_code
        )
        if job is None:
            _demand_outcome(session, lease, "lost", "out_of_memory", "paused", "cancelled")


def ended(names: Sequence[str]) -> list[str]:
    """Returns those of the names that are jobs which have ended; a failed one may be resumed later."""
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


def _demand_outcome(session: Session, lease: Lease, *outcomes: str) -> bool:
    """True if this attempt has already ended so, by a call whose answer got lost; raises LeaseLost."""
    if leases.outcome_of(session, lease.token) not in outcomes:
        raise LeaseLost(lease.job_id)
    return True


def _newest(session: Session, job_id: str, token: int) -> CheckpointRef | None:
    found: Checkpoint | None = leases.newest_checkpoint(session, job_id)
    leases.note_resumed_from(session, token, found.step if found else None)
    if found is None:
        return None
    return CheckpointRef(found.id, found.step, found.store_key, found.manifest_sha256, found.bytes)


def _sentence(line: MetricsLine) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in sorted(line.values.items()))
    return f"Step {line.step}: {values}"
