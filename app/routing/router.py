"""Request router: sends prompts to serve workers and delivers their replies to reply streams.

Each API process has one `RequestRouter` and one reply channel. All code here runs on the thread of
the event loop.

A prompt in flight gets a new wire id each time it is sent. It is sent again if its worker dies or
its replies may have been missed, as long as no reply to it has arrived. Otherwise its reply stream
fails. Late replies to an old wire id are dropped.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar
from uuid import uuid4
from weakref import WeakSet

import structlog
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.contracts.control import Cancel, Keep, Load, ServeWorkerStatus, Unload
from app.contracts.generation import Done, EngineOption, Failure, GenerateRequest, Reply, ReplyBatch
from app.contracts.messages import control_channel, reply_channel
from app.errors import BadRequest, NotFound, StillhouseError, TimedOut, TooManyRequests, Unavailable
from app.metrics.requests import RequestMetrics
from app.routing.admission import Admission
from app.routing.reply_stream import InFlightPrompt, ReplyStream, TokenCount
from app.routing.task_queue import NOWHERE, NotSent, Outbox, queue_key
from app.routing.worker_registry import FAULTS, WorkerRegistry
from app.settings import Settings

log = structlog.get_logger(__name__)
T = TypeVar("T")

MAX_SENDS = 3  # a prompt that three workers have lost may itself be the cause
LOST_SECONDS = 5.0  # silence about a prompt after which an idle worker cannot have received it
FORGOTTEN_SECONDS = 15.0  # the same for a busy worker; the last reply may also have been lost
MAX_KNOWN_BATCHES = 4096  # ids of reply batches that are kept to detect duplicates
DEADLINE_SLACK_SECONDS = 5.0  # workers end late requests themselves; the router waits this longer
LISTEN_SECONDS = 2.0  # how long a request waits for the reply channel to be subscribed
RELISTEN_SECONDS = 0.25
NUM_CANCELS = 8
PING_SECONDS = 2.0
MAX_EMPTY_POLLS = 6  # of one second each: three pings are unanswered, the connection is half open
ERRORS = {400: BadRequest, 404: NotFound, 429: TooManyRequests, 503: Unavailable, 504: TimedOut}


def error_of(failure: Failure) -> StillhouseError:
    """Returns the error that a client gets for a failure reported by a worker."""
    error = ERRORS.get(failure.status, StillhouseError)(
        failure.message, failure.code, failure.param
    )
    error.status = failure.status
    return error


def no_worker(message: str) -> Unavailable:
    """Returns the error for a request that no serve worker can take now."""
    error = Unavailable(message, "no_worker")
    error.retry_after_seconds = 5
    return error


def _kind_of_worker(engine: EngineOption | None) -> str:
    return "serve worker with vLLM" if engine == "vllm" else "serve worker"


class RequestRouter:
    """Sends prompts to serve workers and delivers the replies to their reply streams."""

    def __init__(self, settings: Settings) -> None:
        self.api_id = uuid4().hex[:12]
        self.settings = settings
        self.admission = Admission(
            max_requests=settings.max_waiting_requests,
            max_tokens=settings.max_waiting_tokens,
            max_requests_per_key=settings.max_requests_per_key,
        )
        self.metrics = RequestMetrics()
        self._reply_streams: WeakSet[ReplyStream] = WeakSet()
        self._prompts_in_flight: dict[str, InFlightPrompt] = {}
        self._known_batches: dict[str, None] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._is_listening = asyncio.Event()
        self._outbox = Outbox(settings.redis_url or NOWHERE)
        # No retries: an automatic reconnect would hide that replies were missed.
        self._redis: Redis = Redis.from_url(
            settings.redis_url or NOWHERE,
            socket_timeout=2.0,
            socket_connect_timeout=1.0,
            retry=Retry(NoBackoff(), 0),
        )
        self._registry = WorkerRegistry(self._redis)

    @property
    def workers(self) -> list[ServeWorkerStatus]:
        """The serve workers that were alive at the last refresh of the registry."""
        return self._registry.workers

    async def start(self) -> None:
        """Starts listening for replies and watching workers.

        Does not fail while Redis is unavailable; both tasks keep trying.
        """
        self._spawn(self._forever(self._listen))
        await self._registry.refresh()
        self._spawn(self._forever(self._watch))

    async def stop(self) -> None:
        """Fails all reply streams, cancels their prompts on the workers, and closes connections."""
        for reply_stream in list(self._reply_streams):
            reply_stream.fail(Unavailable("the server is shutting down; try again", "draining"))
        await asyncio.sleep(0.05)  # lets the tasks run that cancel the prompts
        # Repeated, because redis-py swallows a cancellation that arrives while it connects.
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=0.1)
        await self._redis.aclose()
        await self._outbox.aclose()

    async def open(
        self, requests: Sequence[GenerateRequest], on_end: Callable[[TokenCount], None]
    ) -> ReplyStream:
        """Sends the prompts to workers and returns the stream of their replies.

        `on_end` is called once, when the stream ends. Raises Unavailable if there is no worker.
        """
        num_choices = sum(request.n for request in requests)
        reply_stream = ReplyStream(num_choices, on_end, self.metrics.begin(requests))
        self._reply_streams.add(reply_stream)
        prompts_in_flight = [
            InFlightPrompt(reply_stream, self.drop, index, request)
            for index, request in enumerate(requests)
        ]
        reply_stream.prompts_in_flight.update(prompts_in_flight)
        try:
            for prompt_in_flight in prompts_in_flight:
                await self._send(prompt_in_flight)
        except StillhouseError as error:
            reply_stream.fail(error)
            raise
        except BaseException:
            reply_stream.close()
            raise
        return reply_stream

    async def tell(
        self, message: Load | Unload | Keep, engine: EngineOption | None = None
    ) -> list[str]:
        """Sends a control message to all workers, or to those that have the engine.

        Returns the ids of the workers that received it. Raises Unavailable if there are none.
        """
        if not self.workers:
            # Shielded, because redis-py may swallow a cancellation (see `stop`).
            await asyncio.shield(self._spawn(self._registry.refresh()))
        able = [
            w.worker_id
            for w in self.workers
            if (engine is None or w.can_serve(engine)) and not w.is_draining
        ]
        data = message.model_dump_json()
        try:
            told = [name for name in able if await self._redis.publish(control_channel(name), data)]
        except FAULTS:
            raise no_worker("the message queue cannot be reached; try again soon") from None
        if not told:
            raise no_worker(
                f"no {_kind_of_worker(engine)} is running; start one, or try again soon"
            )
        return told

    def drop(self, prompt_in_flight: InFlightPrompt) -> None:
        """Stops waiting for replies to the prompt and cancels it on its worker."""
        if self._prompts_in_flight.pop(prompt_in_flight.wire_id, None) is not None:
            self._spawn(self._cancel(prompt_in_flight.worker_id, prompt_in_flight.wire_id))

    async def _send(self, prompt_in_flight: InFlightPrompt) -> None:
        try:
            async with asyncio.timeout(LISTEN_SECONDS):
                await self._is_listening.wait()
        except TimeoutError:
            raise no_worker("the message queue cannot be reached; try again soon") from None
        prompt_in_flight.worker_id = await self._pick(prompt_in_flight)
        if prompt_in_flight not in prompt_in_flight.reply_stream.prompts_in_flight:
            return  # the stream was closed meanwhile
        prompt_in_flight.num_sends += 1
        prompt_in_flight.wire_id = f"{prompt_in_flight.request.id}.{prompt_in_flight.num_sends}"
        prompt_in_flight.seen_at = time.monotonic()
        self._prompts_in_flight[prompt_in_flight.wire_id] = prompt_in_flight
        traceparent = prompt_in_flight.reply_stream.meter.traceparent
        message = prompt_in_flight.request.model_copy(
            update={
                "id": prompt_in_flight.wire_id,
                "reply_to": self.api_id,
                "traceparent": traceparent,
            }
        )
        try:
            await self._outbox.send(prompt_in_flight.worker_id, message)
        except NotSent:
            raise no_worker("the message queue cannot be reached; try again soon") from None

    async def _pick(self, prompt_in_flight: InFlightPrompt) -> str:
        ours: Counter[str] = Counter()
        for sent in self._prompts_in_flight.values():
            ours[sent.worker_id] += sent.request.num_sequences
        worker_id = self._registry.pick(prompt_in_flight.request, ours)
        if worker_id is None:
            # Shielded, because redis-py may swallow a cancellation (see `stop`).
            await asyncio.shield(self._spawn(self._registry.refresh()))
            worker_id = self._registry.pick(prompt_in_flight.request, ours)
        if worker_id is None:
            kind = _kind_of_worker(prompt_in_flight.request.serving.engine)
            raise no_worker(f"no {kind} is running; start one, or try again soon")
        return worker_id

    async def _forever(self, work: Callable[[], Coroutine[object, object, None]]) -> None:
        """Runs the work again each time that it ends, with or without an error.

        No prompt would be answered without the tasks that listen for replies and watch workers.
        """
        while True:
            try:
                await work()
            except Exception:
                log.exception("listening_restarted")
            await asyncio.sleep(RELISTEN_SECONDS)

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(reply_channel(self.api_id))
                    await self._hear(pubsub)
            except FAULTS as fault:
                if self._is_listening.is_set():
                    log.warning("reply_channel_lost", reason=type(fault).__name__)
            self._is_listening.clear()
            for prompt_in_flight in list(self._prompts_in_flight.values()):
                self._recover(prompt_in_flight, "replies were lost")
            await asyncio.sleep(RELISTEN_SECONDS)

    async def _hear(self, pubsub: PubSub) -> None:
        """Delivers reply batches until the subscription is interrupted.

        Silence is counted in polls, not in seconds. If the event loop was blocked, the replies that
        arrived in that time are still to be read.
        """
        pinged_at = time.monotonic()
        num_empty_polls = 0
        while num_empty_polls < MAX_EMPTY_POLLS:
            if time.monotonic() - pinged_at > PING_SECONDS:
                pinged_at = time.monotonic()
                await pubsub.ping()
            message = await pubsub.get_message(timeout=1.0)
            if message is None:
                num_empty_polls += 1
                continue
            num_empty_polls = 0
            if message["type"] == "message":
                self._deliver(message["data"])
                await asyncio.sleep(0)  # other coroutines run between two messages
            elif message["type"] == "subscribe" and self._is_listening.is_set():
                return  # redis-py reconnected by itself, so replies may have been missed
            elif message["type"] == "subscribe":
                self._is_listening.set()

    def _deliver(self, data: bytes) -> None:
        try:
            batch = ReplyBatch.model_validate_json(data)
        except ValidationError:
            log.warning("reply_malformed", num_bytes=len(data))
            return
        if batch.id in self._known_batches:
            return
        self._known_batches[batch.id] = None
        if len(self._known_batches) > MAX_KNOWN_BATCHES:
            del self._known_batches[next(iter(self._known_batches))]
        now = time.monotonic()
        for reply in batch.replies:
            if (prompt_in_flight := self._prompts_in_flight.get(reply.id)) is not None:
                self._advance(prompt_in_flight, reply, now)

    def _advance(self, prompt_in_flight: InFlightPrompt, reply: Reply, now: float) -> None:
        if isinstance(reply, Failure):
            # Not `drop`, because the worker has already ended the request.
            del self._prompts_in_flight[prompt_in_flight.wire_id]
            if reply.code == "draining" and not prompt_in_flight.is_heard:
                self._recover(prompt_in_flight, reply.message)
            else:
                prompt_in_flight.reply_stream.fail(error_of(reply))
            return
        reply_stream = prompt_in_flight.reply_stream
        prompt_in_flight.is_heard, prompt_in_flight.seen_at = True, now
        reply_stream.meter.note(prompt_in_flight.index, reply, now)
        reply_stream.put(prompt_in_flight.index, reply)
        if isinstance(reply, Done):
            self._prompts_in_flight.pop(prompt_in_flight.wire_id, None)
            reply_stream.prompts_in_flight.discard(prompt_in_flight)
            if not reply_stream.prompts_in_flight:
                reply_stream.complete()

    def _recover(self, prompt_in_flight: InFlightPrompt, why: str) -> None:
        """Sends the prompt again if no reply to it has arrived; otherwise fails its reply stream.

        The stream also fails after MAX_SENDS sends.
        """
        if prompt_in_flight not in prompt_in_flight.reply_stream.prompts_in_flight:
            return
        self.drop(prompt_in_flight)
        if prompt_in_flight.is_heard or prompt_in_flight.num_sends >= MAX_SENDS:
            message = f"the worker that generated this answer was lost ({why}); try again"
            prompt_in_flight.reply_stream.fail(Unavailable(message, "worker_lost"))
        else:
            self.metrics.num_sent_again += 1
            log.info("request_sent_again", id=prompt_in_flight.request.id, reason=why)
            self._spawn(self._send_again(prompt_in_flight))

    async def _send_again(self, prompt_in_flight: InFlightPrompt) -> None:
        try:
            await self._send(prompt_in_flight)
        except StillhouseError as error:
            prompt_in_flight.reply_stream.fail(error)
        except Exception:
            log.exception("request_not_sent_again", id=prompt_in_flight.request.id)
            message = "internal server error; try again"
            prompt_in_flight.reply_stream.fail(StillhouseError(message))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.settings.serve_heartbeat_seconds)
            dead = await self._registry.refresh()
            for worker_id in dead or ():
                # The unread requests of a dead worker are sent again below.
                with contextlib.suppress(*FAULTS):
                    await self._redis.delete(queue_key(worker_id))
            for prompt_in_flight in list(self._prompts_in_flight.values()):
                self._check(prompt_in_flight, can_judge=dead is not None)

    def _check(self, prompt_in_flight: InFlightPrompt, can_judge: bool) -> None:
        idle_since = self._registry.idle_since(prompt_in_flight.worker_id)
        is_named = self._registry.has(prompt_in_flight.worker_id, prompt_in_flight.wire_id)
        if is_named:
            prompt_in_flight.seen_at = time.monotonic()
        patience = max(
            LOST_SECONDS
            if idle_since is not None
            else math.inf
            if is_named is None
            else FORGOTTEN_SECONDS,
            3 * self.settings.serve_heartbeat_seconds,  # a heartbeat may not show it yet
        )
        if time.time() > prompt_in_flight.request.deadline_at + DEADLINE_SLACK_SECONDS:
            prompt_in_flight.reply_stream.fail(
                TimedOut("the request timed out; ask for fewer tokens, or try again")
            )
        elif can_judge and not self._registry.is_known(prompt_in_flight.worker_id):
            self._recover(prompt_in_flight, "it stopped responding")
        elif (
            can_judge
            and time.monotonic() - max(idle_since or 0.0, prompt_in_flight.seen_at) > patience
        ):
            self._recover(prompt_in_flight, "it no longer has the request")

    async def _cancel(self, worker_id: str, wire_id: str) -> None:
        """Tells the worker to stop the request.

        Repeats the message while the worker is alive but not subscribed: it may be reconnecting.
        """
        message = Cancel(id=wire_id).model_dump_json()
        for _ in range(NUM_CANCELS):
            with contextlib.suppress(*FAULTS):
                if await self._redis.publish(control_channel(worker_id), message):
                    return
            if not self._registry.is_known(worker_id):
                return
            await asyncio.sleep(RELISTEN_SECONDS)

    def _spawn(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("request_router_task_failed", exc_info=error)
