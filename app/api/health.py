"""Routes for health checks and metrics."""

import asyncio
import time
from typing import Annotated, Literal

import structlog
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from app.api.deps import Principal, require
from app.api.openapi import TEXT
from app.db.health_checks import ping
from app.db.session import DatabaseUnavailable, PoolExhausted, transaction
from app.metrics.scrape import Scrape
from app.routing.router import RequestRouter
from app.routing.worker_registry import STALLED_SECONDS
from app.services.traffic.recorder import Recorder

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)

CHECK_SECONDS = 1.0  # how long the result of a check is reused


class DatabaseCheck:
    """Checks whether the database answers: one check at a time and at most one per second.

    `/health/ready` needs no key, so any number of requests to it must cost only one cheap query.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[bool] | None = None
        self._checked_at = 0.0

    async def is_available(self) -> bool:
        is_old = time.monotonic() - self._checked_at >= CHECK_SECONDS
        if self._task is None or (self._task.done() and is_old):
            self._task = asyncio.create_task(self._check())
        # Shielded: a caller that is cancelled must not cancel the check for the other callers.
        return await asyncio.shield(self._task)

    async def _check(self) -> bool:
        try:
            return await run_in_threadpool(self._ping)
        finally:
            self._checked_at = time.monotonic()

    def _ping(self) -> bool:
        try:
            with transaction() as session:
                ping(session)
        except (DatabaseUnavailable, PoolExhausted) as error:
            log.warning("database_unavailable", reason=type(error).__name__)
            return False
        return True


class Readiness(BaseModel):
    """Readiness of the service.

    A `degraded` service accepts jobs and all other requests, but it cannot generate text because no
    serve worker is ready. A worker counts as stalled if it has had work for a long time without a
    forward pass. `last_forward_seconds` is the age of the newest forward pass of any worker; null
    before the first one. `dropped_completions` counts the completions that this process
    should have stored but dropped.
    """

    status: Literal["ready", "degraded", "unavailable"]
    database: bool
    serve_workers: int
    stalled_serve_workers: int
    last_forward_seconds: float | None
    dropped_completions: int


class Liveness(BaseModel):
    """Response of a process that is alive."""

    status: Literal["alive"] = "alive"


@router.get("/health/live")
async def live() -> Liveness:
    """Returns 200 while the process is running. It checks nothing else."""
    return Liveness()


@router.get("/health/ready", responses={503: {"model": Readiness}})
async def ready(request: Request, response: Response) -> Readiness:
    """Returns whether the service can handle requests.

    The status is 503 only if the database does not answer. Everything except generation works
    without Redis and without workers. The state of the database may be one second old.
    """
    request_router: RequestRouter = request.app.state.request_router
    recorder: Recorder = request.app.state.recorder
    workers = request_router.workers
    num_stalled = sum(worker.stalled_seconds > STALLED_SECONDS for worker in workers)
    # Both times are from the worker's own clock, so the age is that at its last heartbeat.
    ages = [
        worker.beat_at - worker.last_step_at
        for worker in workers
        if worker.last_step_at is not None
    ]
    found = {
        "serve_workers": len(workers),
        "stalled_serve_workers": num_stalled,
        "last_forward_seconds": round(max(0.0, min(ages)), 3) if ages else None,
        "dropped_completions": recorder.num_dropped,
    }
    if not await request.app.state.database_check.is_available():
        response.status_code = 503
        return Readiness.model_validate({"status": "unavailable", "database": False, **found})
    is_ready = len(workers) > num_stalled
    return Readiness.model_validate(
        {"status": "ready" if is_ready else "degraded", "database": True, **found}
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": TEXT}}})
def metrics(
    request: Request, principal: Annotated[Principal, Depends(require("admin"))]
) -> Response:
    """Returns Prometheus metrics. They cover all projects, so the key needs the scope `admin`."""
    recorder: Recorder = request.app.state.recorder
    recorder.note_metrics()
    scrape: Scrape = request.app.state.scrape
    return Response(scrape.text(), media_type=CONTENT_TYPE_LATEST)
