"""Supervisor of a train worker: claims jobs and runs one attempt at each until none is due."""

import contextlib
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from app.crash_points import crash_point
from app.settings import get_settings
from app.tracing.spans import Attribute, current_span, start_span
from worker.jobs import lease_client
from worker.jobs.attempt import Attempt
from worker.jobs.lease_client import Lease, LeaseLost
from worker.jobs.lease_heartbeat import DATABASE_AWAY, LeaseHeartbeat

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = structlog.get_logger(__name__)


def run_until_idle(
    worker_id: str,
    should_drain: Callable[[], bool],
    note_job: Callable[[str | None], None] = lambda job_id: None,
) -> int:
    """Runs due jobs one after the other and returns how many it ran.

    Stops early when the worker drains or the database is unavailable. `note_job` is called with the
    id of each job before it runs, and with None after it.
    """
    num_runs = 0
    while not should_drain():
        try:
            free_ended()
            lease = lease_client.claim(worker_id)
        except DATABASE_AWAY as error:
            log.warning("claim_failed", error=type(error).__name__)
            break
        if lease is None:
            break
        num_runs += 1
        # Each line that the worker logs from here on names the job, also those of other threads.
        ids = {"job": lease.job_id, "attempt": lease.attempt}
        with structlog.contextvars.bound_contextvars(**ids), current_span(job_span(lease)):
            log.info("job_claimed", kind=lease.spec.kind)
            crash_point("claim.committed")
            note_job(lease.job_id)
            try:
                run_job(lease, should_drain)
            finally:
                note_job(None)
    return num_runs


def job_span(lease: Lease) -> "Span | None":
    """Returns a new span for the attempt, whose parent is the request that submitted the job."""
    attributes: dict[str, Attribute] = {
        "stillhouse.job.id": lease.job_id,
        "stillhouse.job.kind": lease.spec.kind,
        "stillhouse.job.attempt": lease.attempt,
    }
    return start_span(f"job {lease.spec.kind}", "consumer", attributes, parent=lease.traceparent)


def free_ended() -> None:
    """Deletes work folders of ended jobs, which remain if a worker was killed.

    The folders of attempts are listed before the jobs are queried. A failed job may be resumed in
    between, and the folder of its new attempt must not be deleted.
    """
    root = get_settings().work_root()
    try:
        # Job ids are ASCII. Other names are skipped, because the database refuses invalid UTF-8.
        attempts = {
            path.name: list(path.glob("*")) for path in root.glob("*") if path.name.isascii()
        }
        for job_id in lease_client.ended(list(attempts)):
            for folder in attempts[job_id]:
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                (root / job_id).rmdir()
            if (root / job_id).exists():
                log.warning("work_folder_stays", job=job_id)
    except OSError:
        log.exception("free_ended_failed")  # not fatal: jobs can still run


def run_job(lease: Lease, should_drain: Callable[[], bool]) -> None:
    """Runs one attempt at a leased job. Errors are logged and recorded, not raised."""
    settings = get_settings()
    with LeaseHeartbeat(lease, beat_seconds=settings.heartbeat_seconds) as lease_heartbeat:
        attempt = Attempt(lease, lease_heartbeat, should_drain, settings)
        try:
            attempt.run()
        except LeaseLost:
            log.warning("lease_lost", job=lease.job_id, attempt=lease.attempt)
        except Exception as error:
            log.exception("attempt_failed", job=lease.job_id, attempt=lease.attempt)
            attempt.give_up(error)
        finally:
            attempt.clean_up()
