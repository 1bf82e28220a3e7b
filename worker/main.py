"""Worker process: `python -m worker.main train|serve`. SIGTERM or SIGINT drains it."""

import argparse
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from types import FrameType
from typing import Literal
from uuid import uuid4

import structlog
from celery import Celery, signals
from celery.exceptions import SecurityWarning
from celery.worker import state
from kombu import Exchange, Queue

from app import crash_points
from app.contracts.messages import TRAIN_QUEUE, WAKE_UP_TASK, serve_queue
from app.log_config import configure_logging
from app.settings import Settings, celery_settings, get_settings
from app.tracing.spans import start_tracing, stop_tracing
from worker import cuda
from worker.models.merged_copies import plain_folder
from worker.tasks import add_generate, add_wake_up
from worker.watchdog import Inbox, WorkLoop

log = structlog.get_logger(__name__)

STOP_SECONDS = 10.0  # time for a silent consumer to end by itself
QUEUE_SECONDS = 600  # lifetime of a queue without a consumer


def main(arguments: list[str]) -> int:
    """Runs a worker until it is told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.main", description=__doc__)
    parser.add_argument("role", choices=("train", "serve"))
    parser.add_argument(
        "--ready-fd", type=int, help="file descriptor that gets a byte when the worker is ready"
    )
    parsed = parser.parse_args(arguments)
    settings = get_settings()
    configure_logging(settings.log_level, replaces_handlers=True)
    start_tracing(settings, f"{parsed.role}-worker")
    crash_points.arm(settings.crash_dir)

    def announce() -> None:
        """Tells the parent process that the worker is ready."""
        if parsed.ready_fd is not None:
            with suppress(BrokenPipeError):  # the parent has closed its end
                os.write(parsed.ready_fd, b"\n")
            os.close(parsed.ready_fd)

    try:
        return train(settings, announce) if parsed.role == "train" else serve(settings, announce)
    finally:
        stop_tracing()


def train(settings: Settings, announce: Callable[[], None]) -> int:
    """Runs a train worker: one job at a time, each in its own run process."""
    # Imported here, because a serve worker needs neither the supervisor nor the database.
    from worker.jobs.presence import Presence
    from worker.jobs.supervisor import run_until_idle

    if settings.train_cuda_devices:
        cuda.restrict_to(settings.train_cuda_devices)
        cuda.require(
            settings.train_cuda_devices, cuda.count_in_child(), "STILLHOUSE_TRAIN_CUDA_DEVICES"
        )
    is_draining = threading.Event()
    worker_id = new_worker_id("train")
    app = make_app(settings, TRAIN_QUEUE)

    presence = Presence(worker_id, settings)
    work_loop = WorkLoop(
        lambda: run_until_idle(worker_id, is_draining.is_set, presence.note_job),
        every_seconds=settings.ring_again_seconds,
    )

    def drain() -> None:
        """Stops the consumer; Celery then waits for the running task, which sees `is_draining`."""
        is_draining.set()
        stop_consuming()

    def ready() -> None:
        """Wakes up the worker for jobs that were submitted while no worker was running."""
        app.send_task(WAKE_UP_TASK, queue=TRAIN_QUEUE)
        announce()

    add_wake_up(app, work_loop.wake_up)
    with presence, work_loop:
        try:
            return run(app, worker_id, ready=ready, drain=drain)
        finally:
            # Also set if the consumer has failed: the periodic thread may be running a job.
            is_draining.set()


def serve(settings: Settings, announce: Callable[[], None]) -> int:
    """Runs a serve worker. While it drains, it refuses new requests and completes running ones."""
    claim = cuda.claim_for_serving(settings)  # before torch initialises CUDA

    # Imported here, because a train worker does not need these modules.
    from app.fast_imports import imports_done  # isort: split

    import torch
    from transformers.utils import logging as transformers_logging

    from app.artifact_cache import ArtifactCache
    from app.storage import store
    from worker.core_sharing import shared_cores
    from worker.serve.device_memory import resident_bytes
    from worker.serve.host.model_host import ModelHost
    from worker.serve.vllm_core import has_vllm
    from worker.serve_worker import FAULTS, ServeOptions, ServeWorker, connect

    imports_done()
    transformers_logging.disable_progress_bar()
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    device = choose_device(settings.serve_device, has_cuda=torch.cuda.is_available())
    worker_id = new_worker_id("serve")
    copies = ArtifactCache(store(), settings.work_root() / "models", settings.artifact_cache_bytes)
    host = ModelHost(
        resident_bytes=resident_bytes(settings.resident_model_bytes, device),
        loader=partial(plain_folder, copies),
        retain=copies.retain,
        max_running=settings.max_running_sequences,
        max_context_tokens=settings.max_context_tokens,
        model_load_wait_seconds=settings.model_load_wait_seconds,
        device=device,
        precision=settings.serve_precision,
        steps="auto" if settings.serve_cuda_graphs else "plain",
    )
    options = ServeOptions(
        worker_id=worker_id,
        redis_url=settings.redis_url,
        max_running=settings.max_running_sequences,
        heartbeat_seconds=settings.serve_heartbeat_seconds,
        engines=("transformers", "vllm") if has_vllm() else ("transformers",),
        shared_cores=shared_cores(settings) if host.device == "cpu" else None,
        training_share=settings.training_cpu_share,
    )
    worker = ServeWorker(host, options, lambda is_asked: stop_consuming(0 if is_asked else 1))
    queue = serve_queue(worker_id)
    # no acknowledgements: the request router repeats requests that a worker has read before it died
    app = make_app(settings, queue, no_ack=True)
    add_generate(app, worker.submit)
    inbox = connect(settings.redis_url)
    Inbox(lambda: inbox.lindex(queue_key(app, queue), -1), give_up, faults=FAULTS).start()

    def ready() -> None:
        """Starts the threads of the serve worker."""
        worker.start()
        announce()

    with closing(claim):
        return run(app, worker_id, ready=ready, drain=worker.drain)


def choose_device(asked: Literal["auto", "cpu", "cuda"], *, has_cuda: bool) -> str:
    """Returns the device of the engine. Exits if `asked` is "cuda" and there is no CUDA device."""
    if asked == "cuda" and not has_cuda:
        sys.exit(
            "STILLHOUSE_SERVE_DEVICE is cuda, but PyTorch finds no CUDA device; set it to auto or cpu"
        )
    return "cuda" if has_cuda and asked != "cpu" else "cpu"


def make_app(settings: Settings, queue: str, *, no_ack: bool = False) -> Celery:
    """Returns a Celery app that consumes one queue. A queue without a consumer expires in Redis.

    `no_ack` saves two round trips to Redis per message. Redis then keeps no copy of a message
    while a worker handles it.
    """
    app = Celery("stillhouse")
    app.conf.update(celery_settings(settings))
    app.conf.task_queues = (
        Queue(queue, Exchange(queue), routing_key=queue, expires=QUEUE_SECONDS, no_ack=no_ack),
    )
    app.conf.task_default_queue = queue
    return app


def queue_key(app: Celery, queue: str) -> str:
    """Returns the key of the Redis list that holds the messages of a queue."""
    return f"{app.conf.broker_transport_options['global_keyprefix']}{queue}"


def run(
    app: Celery,
    worker_id: str,
    *,
    ready: Callable[[], None],
    drain: Callable[[], None],
) -> int:
    """Consumes the queue until stopped and returns the exit status.

    `ready` is called when the consumer is ready, `drain` at each SIGTERM, SIGINT or SIGHUP.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        """Signal handler that starts the drain."""
        log.info("draining", worker=worker_id, signal=signal.Signals(number).name)
        drain()

    def on_ready(**_: object) -> None:
        """Replaces Celery's signal handlers, which are installed before this is called."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, on_signal)
        log.info("worker_ready", worker=worker_id)
        ready()

    # Celery warns about pickled messages when it runs as root, but our messages are JSON.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    signals.setup_logging.connect(leave_logging_alone)
    signals.worker_ready.connect(on_ready, weak=False)
    worker = app.Worker(
        hostname=worker_id,
        pool="threads",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    log.info("worker_stopped", worker=worker_id)
    return int(worker.exitcode or 0)


def stop_consuming(exit_status: int = 0) -> None:
    """Ends the Celery consumer at the next iteration of its loop."""
    state.should_stop = exit_status


def give_up() -> None:
    """Ends the process with an error, so that the process manager restarts it.

    If the consumer does not stop within `STOP_SECONDS`, the process exits without clean-up.
    """
    stop_consuming(1)
    time.sleep(STOP_SECONDS)
    os._exit(1)


def new_worker_id(role: str) -> str:
    """Returns an id that is unique to this process.

    A restarted worker therefore gets neither the messages nor the failures of its predecessor.
    """
    return f"{role}-{socket.gethostname()[:40]}-{uuid4().hex[:8]}"


def leave_logging_alone(**_: object) -> None:
    """Does nothing: Celery leaves logging alone if its `setup_logging` signal has a receiver."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
