"""Serve worker: one engine thread between the request queue and the reply channels.

Requests come from Celery's threads. Cancellations and model commands come from the control
channel. The model host takes both at its next step. The replies of a step are published together
for each API process. A heartbeat key in Redis says that the worker is alive and what it has loaded.
"""

import contextlib
import os
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import redis
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.contracts.control import CONTROL, Cancel, Keep, ServeWorkerStatus
from app.contracts.generation import Delta, Done, EngineName, Failure, GenerateRequest, Reply
from app.contracts.messages import control_channel, reply_channel, serve_worker_key
from app.tracing.generation import GenerationSpan, start_generation
from worker.core_sharing import CoreTurns
from worker.cpu.thread_slices import take_long_slices
from worker.reply_batches import reply_batches
from worker.serve.host.model_host import HostStatus, ModelHost

log = structlog.get_logger(__name__)

FAULTS = (RedisError, OSError)
WAIT_SECONDS = 0.25  # longest sleep of an engine thread without work
BEATS_TO_LIVE = 3  # heartbeat intervals after which the heartbeat key expires
DRAIN_SECONDS = 30.0  # time for running requests to complete while the worker drains
STALL_SECONDS = 300.0  # a longer step is taken to hang
MAX_EARLY_CANCELS = 4096  # cancellations kept that arrived before their request


@dataclass(frozen=True)
class ServeOptions:
    """Options of a serve worker."""

    worker_id: str
    redis_url: str
    max_running: int
    heartbeat_seconds: float
    engines: tuple[EngineName, ...] = ("transformers",)
    drain_seconds: float = DRAIN_SECONDS
    shared_cores: Path | None = None  # where training runs on the same cores announce themselves
    training_share: float = 0.0


def connect(url: str) -> "redis.Redis":
    """Returns a Redis client with short timeouts and one retry, for a stale connection."""
    return redis.Redis.from_url(
        url,
        socket_timeout=2.0,
        socket_connect_timeout=1.0,
        health_check_interval=5,
        retry=Retry(NoBackoff(), 1),
    )


def _open_turns(options: ServeOptions) -> CoreTurns | None:
    if options.shared_cores is None:
        return None
    try:
        return CoreTurns(options.shared_cores, options.training_share)
    except OSError as error:  # e.g. a full disk; serving works without it, only slower
        log.warning("core_turns_disabled", reason=str(error))
        return None


class ServeWorker:
    """Runs a ModelHost in an engine thread and connects it to Redis.

    `on_end` is called from the engine thread when it ends: with True after a drain, with False
    after an error.
    """

    def __init__(
        self, host: ModelHost, options: ServeOptions, on_end: Callable[[bool], None]
    ) -> None:
        self._host = host
        self._options = options
        self._on_end = on_end
        self._redis = connect(options.redis_url)
        self._lock = threading.Lock()  # guards `_reply_channels` and `_early_cancels`
        # request id -> API process that waits for the reply
        self._reply_channels: dict[str, str] = {}
        self._early_cancels: OrderedDict[str, None] = OrderedDict()
        self._spans: dict[str, GenerationSpan] = {}  # by request id; empty unless tracing is on
        self._drain_until: float | None = None
        self._has_ended = threading.Event()
        self._turns = _open_turns(options)
        self._turned_at = time.monotonic()

    def start(self) -> None:
        for work, name in (
            (self._serve, "engine"),
            (self._beat, "heartbeat"),
            (self._listen, "control"),
        ):
            threading.Thread(target=work, name=name, daemon=True).start()

    def submit(self, request: GenerateRequest) -> None:
        """Accepts a request. Thread-safe.

        A repeated request is ignored, and so is one that was cancelled before it arrived.
        """
        if self._drain_until is not None:
            message = "the worker is shutting down; try again"
            self._send(
                request.reply_to,
                [Failure(id=request.id, status=503, code="draining", message=message)],
            )
            return
        with self._lock:
            if request.id not in self._reply_channels and request.id not in self._early_cancels:
                self._reply_channels[request.id] = request.reply_to
                if span := start_generation(request, "server", parent=request.traceparent):
                    self._spans[request.id] = span
                self._host.submit(request)

    def cancel(self, request_id: str) -> None:
        """Stops a request at the next step, without a reply. Thread-safe."""
        with self._lock:
            if self._reply_channels.pop(request_id, None) is not None:
                self._end_span(request_id, "aborted")
                self._host.abort(request_id)
                return
            self._early_cancels[request_id] = None
            if len(self._early_cancels) > MAX_EARLY_CANCELS:
                self._early_cancels.popitem(last=False)

    def drain(self) -> None:
        """Refuses new requests from now on.

        The worker ends when all running requests are complete, or after `drain_seconds`.
        """
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._options.drain_seconds

    def _serve(self) -> None:
        is_as_asked = False
        take_long_slices()
        try:
            while not self._is_drained():
                self._wait_for_turn()
                self._turned_at = time.monotonic()
                self._publish(addressed.reply for addressed in self._host.step_all())
            self._fail_all(
                503, "draining", "the worker was stopped before the answer was complete; try again"
            )
            is_as_asked = True
        except BaseException:  # after any error, clients must still get a reply
            log.exception("engine_thread_failed")
            self._fail_all(
                500,
                "internal_error",
                "the engine failed on this request or on another one in its batch",
            )
        if self._turns is not None:
            self._turns.release()
        self._has_ended.set()
        self._on_end(is_as_asked)

    def _wait_for_turn(self) -> None:
        """Waits up to `WAIT_SECONDS` for work, and takes the CPU cores if there is any."""
        if self._turns is None:
            self._host.wait_for_work(WAIT_SECONDS)
            return
        if not self._host.wait_for_work(0.0):
            self._turns.release()
            if not self._host.wait_for_work(WAIT_SECONDS):
                return
        self._turns.take()

    def _is_drained(self) -> bool:
        if self._drain_until is None:
            return False
        return not self._reply_channels or time.monotonic() > self._drain_until

    def _publish(self, replies: Iterable[Reply]) -> None:
        batches: defaultdict[str, list[Reply]] = defaultdict(list)
        with self._lock:
            for reply in replies:
                # None: the request was cancelled meanwhile
                home = self._reply_channels.get(reply.id)
                if home is not None:
                    batches[home].append(reply)
                if reply.id in self._spans:
                    self._note_reply(reply)
                if not isinstance(reply, Delta):
                    self._reply_channels.pop(reply.id, None)
        for home, batch in batches.items():
            if not self._send(home, batch):
                self._abandon(home)

    def _send(self, home: str, replies: list[Reply]) -> bool:
        """Publishes the replies and returns whether the API process has received all of them."""
        channel = reply_channel(home)
        try:
            return all(
                self._redis.publish(channel, batch.model_dump_json())
                for batch in reply_batches(replies)
            )
        except FAULTS as fault:
            log.warning("replies_unsent", reason=type(fault).__name__, num_replies=len(replies))
            return False

    def _abandon(self, home: str) -> None:
        """Aborts all requests of an API process that has ended or has missed replies.

        If it is still running, it sends its requests again.
        """
        with self._lock:
            for request_id in [
                request_id for request_id, other in self._reply_channels.items() if other == home
            ]:
                del self._reply_channels[request_id]
                self._end_span(request_id, "aborted")
                self._host.abort(request_id)

    def _note_reply(self, reply: Reply) -> None:
        if isinstance(reply, Failure):
            self._end_span(reply.id, "failed", reply.code)
            return
        self._spans[reply.id].note(reply)
        if isinstance(reply, Done):
            self._end_span(reply.id, "completed")

    def _end_span(self, request_id: str, outcome: str, error: str | None = None) -> None:
        if (span := self._spans.pop(request_id, None)) is not None:
            span.end(outcome, error)

    def _fail_all(self, status: int, code: str, message: str) -> None:
        self._publish(
            [
                Failure(id=id_, status=status, code=code, message=message)
                for id_ in list(self._reply_channels)
            ]
        )

    def status(self) -> ServeWorkerStatus:
        """Returns the content of the next heartbeat."""
        host = self._host.status()
        is_unplaced = self._reply_channels and not host.num_running and not host.num_waiting
        return ServeWorkerStatus(
            worker_id=self._options.worker_id,
            engines=self._options.engines,
            resident=host.resident,
            loading=host.loading,
            models=host.models,
            loads=host.loads,
            num_running=host.num_running,
            num_waiting=len(self._reply_channels) if is_unplaced else host.num_waiting,
            max_running=self._options.max_running,
            resident_bytes=self._host.resident_bytes,
            requests=self._open(),
            is_draining=self._drain_until is not None,
            last_step_at=host.last_step_at,
            stalled_seconds=self._stalled_seconds(host),
            beat_at=time.time(),
        )

    def _open(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._reply_channels)

    def _stalled_seconds(self, host: HostStatus) -> float:
        """Returns how long the engine thread has made no progress.

        It makes none if its loop does not continue, or if there are running sequences but no
        forward passes.
        """
        stalled = time.monotonic() - self._turned_at - WAIT_SECONDS
        if host.num_running and host.last_step_at is not None:
            stalled = max(stalled, time.time() - host.last_step_at)
        return max(0.0, stalled)

    def _beat(self) -> None:
        lifetime_ms = round(1000 * max(2.0, BEATS_TO_LIVE * self._options.heartbeat_seconds))
        key = serve_worker_key(self._options.worker_id)
        is_heard = True
        while True:
            if time.monotonic() - self._turned_at > STALL_SECONDS:
                log.critical("engine_stalled", seconds=STALL_SECONDS)
                os._exit(70)  # a step that hangs cannot be ended from another thread
            try:
                self._redis.set(key, self.status().model_dump_json(), px=lifetime_ms)
                is_heard = True
            except FAULTS as fault:
                if is_heard:
                    log.warning("heartbeat_unsent", reason=type(fault).__name__)
                is_heard = False
            if self._has_ended.wait(self._options.heartbeat_seconds):
                break
        with contextlib.suppress(*FAULTS):
            self._redis.delete(key)

    def _handle_control(self, data: bytes) -> None:
        message = CONTROL.validate_json(data)
        if isinstance(message, Cancel):
            self.cancel(message.id)
        elif isinstance(message, Keep):  # lists all pinned models, also those for other engines
            engines = ("auto", *self._options.engines)
            able = tuple(m for m in message.models if m.serving.engine in engines)
            self._host.tell(Keep(models=able))
        else:
            self._host.tell(message)

    def _listen(self) -> None:
        """Handles messages of the control channel.

        Messages that arrive during a reconnect are lost. The API repeats those that matter.
        """
        while not self._has_ended.is_set():
            try:
                with (
                    connect(self._options.redis_url) as client,
                    client.pubsub(ignore_subscribe_messages=True) as subscription,
                ):
                    subscription.subscribe(control_channel(self._options.worker_id))
                    while not self._has_ended.is_set():
                        message = subscription.get_message(timeout=1.0)
                        if message is not None and message["type"] == "message":
                            self._handle_control(message["data"])
            except (*FAULTS, ValueError) as fault:
                log.warning("control_channel_lost", reason=type(fault).__name__)
                self._has_ended.wait(0.5)
