"""The FastAPI application: routes, error handling and background tasks."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from app import auth
from app.api import batches, completions, dashboard, errors, files, health, jobs, models, serving
from app.api.inference import responses, tokenizers
from app.api.middleware import RequestFrame
from app.api.openapi import ERRORS
from app.api.organization import usage
from app.api.traffic import datasets, stored_completions
from app.api.webhooks import endpoints as webhook_endpoints
from app.db.session import DatabaseUnavailable, PoolExhausted
from app.log_config import configure_logging
from app.metrics.scrape import Scrape
from app.routing import task_queue
from app.routing.router import RequestRouter
from app.routing.task_queue import NOWHERE
from app.services.batch.batch_runner import BatchRunner
from app.services.limits.rate_limiter import RateLimiter
from app.services.pin_broadcaster import PinBroadcaster
from app.services.reconciler import Reconciler
from app.services.trackers.forwarder import forwarder_threads
from app.services.traffic.recorder import Recorder
from app.services.usage.recorder import UsageRecorder
from app.services.webhooks.deliverer import DelivererThread
from app.settings import Settings, get_settings
from app.tracing.spans import start_tracing, stop_tracing

log = structlog.get_logger(__name__)
JOIN_SECONDS = 10.0


def create_app(settings: Settings | None = None) -> FastAPI:
    """Returns the ASGI application, for `uvicorn --factory app.main:create_app`."""
    settings = settings or get_settings()
    configure_logging(settings.log_level)
    start_tracing(settings, "api")
    app = FastAPI(
        title="Stillhouse",
        summary="Distils large language models into small ones, and serves them.",
        version="0.1.0",
        docs_url=None,  # the page would load scripts from another site
        redoc_url=None,
        responses=ERRORS,
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.database_check = health.DatabaseCheck()
    app.state.request_router = RequestRouter(settings)
    app.state.scrape = Scrape(app.state.request_router)
    app.state.batch_runner = BatchRunner(app.state.request_router)
    app.state.pin_broadcaster = PinBroadcaster(app.state.request_router)
    app.state.recorder = Recorder(settings)
    app.state.rate_limiter = RateLimiter(settings.redis_url or NOWHERE)
    app.state.usage_recorder = UsageRecorder()
    errors.install(app)
    # Routes are matched in this order. Completions come first to keep time to first token low.
    modules = (
        completions,
        stored_completions,
        responses,
        tokenizers,
        health,
        files,
        jobs,
        models,
        serving,
        batches,
        datasets,
        dashboard,
        usage,
        webhook_endpoints,
    )
    for module in modules:
        app.include_router(module.router)
    app.add_middleware(
        RequestFrame,
        max_body_bytes=settings.max_body_bytes,
        logs_requests=settings.log_requests,
    )
    if settings.allowed_origins:
        origins = settings.allowed_origins.replace(",", " ").split()
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods="*",
            allow_headers="*",
            expose_headers="*",
        )
    return app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Starts the background tasks of the API process, and stops them at shutdown."""
    settings: Settings = app.state.settings
    auth.key_pepper(settings)  # raises if there is no pepper, without which all keys are refused
    reconciler = ReconcilerThread(settings.reconcile_seconds)
    deliverer = DelivererThread()
    reconciler.start()
    deliverer.start()
    forwarders = forwarder_threads(settings)
    for forwarder in forwarders:
        forwarder.start()
    await app.state.request_router.start()
    await app.state.batch_runner.start()
    await app.state.pin_broadcaster.start()
    app.state.recorder.start()
    app.state.usage_recorder.start()
    # A garbage collection that scans all imported modules would block the event loop too long.
    gc.collect()
    gc.freeze()
    gc.enable()  # `stillhouse api` imports this module without it
    try:
        yield
    finally:
        await app.state.pin_broadcaster.stop()
        # Before the router, which sends the cancellations of the batches' requests to the workers.
        await app.state.batch_runner.stop()
        await app.state.request_router.stop()
        # After the router, whose last answers are settled, recorded and stored.
        await app.state.rate_limiter.stop()
        await asyncio.to_thread(app.state.usage_recorder.stop)
        await asyncio.to_thread(app.state.recorder.stop)
        stops = [deliverer.stop, reconciler.stop, *(forwarder.stop for forwarder in forwarders)]
        await asyncio.gather(*(asyncio.to_thread(stop) for stop in stops))
        await asyncio.to_thread(stop_tracing)


class ReconcilerThread(threading.Thread):
    """Background thread that runs the reconciler every `every_seconds` seconds.

    Every API process has one. An advisory lock in Postgres lets only one of them act at a time.
    """

    def __init__(self, every_seconds: float) -> None:
        super().__init__(name="reconciler", daemon=True)
        self._every_seconds = every_seconds
        self._reconciler = Reconciler(task_queue.notify_workers_again)
        self._is_stopping = threading.Event()

    def run(self) -> None:
        while not self._is_stopping.wait(self._every_seconds):
            try:
                self._reconciler.step()
            except (DatabaseUnavailable, PoolExhausted) as fault:
                log.warning("reconcile_postponed", reason=type(fault).__name__)
            except Exception:
                log.exception("reconcile_failed")  # the thread must keep running

    def stop(self) -> None:
        self._is_stopping.set()
        self.join(JOIN_SECONDS)
