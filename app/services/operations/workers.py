"""Describes the serve workers, and the running jobs with the workers that hold their leases."""

import time
from collections.abc import Collection, Mapping
from typing import Literal

from app.auth import Principal
from app.contracts.control import ModelState, ServeWorkerStatus
from app.contracts.generation import ServingOptions, serving_key_of, store_key_of
from app.db import models
from app.db.registry.running_jobs import RunningJob, count_running_jobs, list_running_jobs
from app.db.session import transaction
from app.routing.worker_registry import STALLED_SECONDS
from app.schemas.operations.workers import (
    ResidentModel,
    RunningJobObject,
    ServeWorkerObject,
    WorkersObject,
)
from app.settings import get_settings

LATE_SECONDS = 10.0  # after the time at which a heartbeat was due


def describe(principal: Principal, workers: Collection[ServeWorkerStatus]) -> WorkersObject:
    """Returns the state of the workers as the caller may see it.

    Jobs are left out if the key lacks the scope `jobs:read`.
    """
    project_id = None if principal.has("admin") else principal.project_id
    store_keys = {store_key_of(model.serving_key) for worker in workers for model in worker.models}
    with transaction() as session:
        names = {
            serving_key_of(row.store_key, ServingOptions.model_validate(row.serving or {})): row.id
            for row in models.list_serving_names(session, project_id, store_keys)
        }
        jobs = list_running_jobs(session, project_id) if principal.has("jobs:read") else []
        num_running = count_running_jobs(session)
    return WorkersObject(
        serve_workers=[
            _serve_worker(worker, names)
            for worker in sorted(workers, key=lambda worker: worker.worker_id)
        ],
        running_jobs=[_running_job(job) for job in jobs],
        num_running_jobs=num_running,
    )


def _serve_worker(worker: ServeWorkerStatus, names: Mapping[str, str]) -> ServeWorkerObject:
    state: Literal["ready", "stalled", "draining"] = "ready"
    if worker.is_draining:
        state = "draining"
    elif worker.stalled_seconds > STALLED_SECONDS:
        state = "stalled"
    return ServeWorkerObject(
        id=worker.worker_id,
        state=state,
        engines=list(worker.engines),
        num_running=worker.num_running,
        num_waiting=worker.num_waiting,
        max_running=worker.max_running,
        resident_bytes=sum(model.bytes for model in worker.models if model.state == "resident"),
        max_resident_bytes=worker.resident_bytes or get_settings().resident_model_bytes,
        # The clocks of two machines may differ a little.
        heartbeat_age_seconds=round(max(0.0, time.time() - worker.beat_at), 3),
        stalled_seconds=worker.stalled_seconds,
        models=[_resident_model(model, names.get(model.serving_key)) for model in worker.models],
    )


def _resident_model(model: ModelState, name: str | None) -> ResidentModel:
    first_token = model.first_token_seconds
    return ResidentModel(
        model=name,
        state=model.state,
        bytes=model.bytes,
        percent=model.percent,
        weights=model.weights,
        first_token_ms=None if first_token is None else round(first_token * 1000, 1),
        is_pinned=model.is_pinned,
        # A message may name the files of another project's model.
        error=model.error if name is not None else None,
    )


def _running_job(job: RunningJob) -> RunningJobObject:
    return RunningJobObject(
        id=job.id,
        kind=job.kind,
        name=job.model_id,
        worker=job.lease_owner,
        attempt=job.attempt,
        stage=job.stage,
        percent=job.progress.get("percent"),
        heartbeat_age_seconds=round(max(0.0, job.heartbeat_age_seconds), 3),
        is_late=job.heartbeat_age_seconds > get_settings().heartbeat_seconds + LATE_SECONDS,
        lease_seconds=round(job.lease_seconds, 3),
    )
