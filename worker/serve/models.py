"""Keeps models loaded within a byte limit and steps all their engines; loading never holds the stepping up."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import structlog

from app.contracts import ArtifactRef, Delta, GenerateRequest, Reply
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.errors import (
    DeadlinePassed,
    ModelLoadFailed,
    ModelLoading,
    ModelTooLarge,
    ServeError,
    failure_of,
)
from worker.serve.loading import LoadedModel, load_model

log = structlog.get_logger()


class Addressed(NamedTuple):
    """A reply and the API process that waits for it."""

    reply_to: str
    reply: Reply


@dataclass(frozen=True)
class HostStatus:
    """A snapshot for the heartbeat; models are named by the store key of their weights."""

    resident: tuple[str, ...]
    loading: tuple[str, ...]
    num_running: int
    num_waiting: int
    last_step_at: float | None


@dataclass
class _Resident:
    engine: Engine
    num_bytes: int
    used_at: float


@dataclass
class _Parked:
    """A request whose model is not loaded yet."""

    request: GenerateRequest
    waits_until: float


@dataclass
class ModelHost:
    """Engines by model, least recently used out first.

    `submit`, `abort`, `status`, `has_work` and `wait_for_work` may be called from any thread; `step_all`
    and `close` belong to one. `loader` gives the local folder of an artifact and runs in the loading thread.
    """

    resident_bytes: int
    loader: Callable[[ArtifactRef], Path]
    max_running: int = 32
    max_context_tokens: int = 2048
    model_load_wait_seconds: float = 30.0
    device: str = "cpu"
    clock: Callable[[], float] = time.time
    _inbox: "queue.SimpleQueue[GenerateRequest | str]" = field(default_factory=queue.SimpleQueue, init=False)
    _bell: threading.Event = field(default_factory=threading.Event, init=False)
    _residents: dict[str, _Resident] = field(default_factory=dict, init=False)
    _loads: dict[str, "Future[LoadedModel]"] = field(default_factory=dict, init=False)
    _load_bytes: dict[str, int] = field(default_factory=dict, init=False)
    _parked: dict[str, _Parked] = field(default_factory=dict, init=False)
    _requests: dict[str, GenerateRequest] = field(default_factory=dict, init=False)
    _outbox: list[Addressed] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._status = HostStatus((), (), 0, 0, None)

    def submit(self, request: GenerateRequest) -> None:
        """Takes a request; loads its model if need be. Everything that goes wrong comes as a Failure."""
        self._inbox.put(request)
        self._bell.set()

    def abort(self, request_id: str) -> None:
        """Ends a request without a reply at the next `step_all`."""
        self._inbox.put(request_id)
        self._bell.set()

    def status(self) -> HostStatus:
        """As it was at the end of the last `step_all`."""
        return self._status

    def has_work(self) -> bool:
        """Whether a request is under way, or a message or a finished load waits."""
        return bool(self._requests) or self._can_step()

    def wait_for_work(self, timeout_seconds: float) -> bool:
        """Sleeps until there is something to step, or the time is up; gives whether there is."""
        if not self._can_step():
            self._bell.wait(timeout_seconds)
        return self._can_step()

    def step_all(self) -> list[Addressed]:
        """One step of every engine with work, and all replies that are due."""
        self._bell.clear()
        self._read_inbox()
        self._collect_loads()
        self._place_parked()
        for key, resident in list(self._residents.items()):
            if resident.engine.has_work():
                resident.used_at = self.clock()
                self._step(key, resident.engine)
        replies, self._outbox = self._outbox, []
        self._status = self._snapshot()
        return replies

    def close(self) -> None:
        """Ends the loading thread; requests under way are forgotten."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _can_step(self) -> bool:
        is_stepping = any(resident.engine.has_work() for resident in list(self._residents.values()))
        has_loaded = any(load.done() for load in list(self._loads.values()))
        return is_stepping or has_loaded or not self._inbox.empty()

    def _read_inbox(self) -> None:
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, GenerateRequest):
                if message.id in self._requests:
                    continue  # delivered twice
                self._requests[message.id] = message
                self._parked[message.id] = _Parked(message, self.clock() + self.model_load_wait_seconds)
            elif (request := self._requests.pop(message, None)) is not None:
                self._parked.pop(request.id, None)
                if (resident := self._residents.get(request.weights.key)) is not None:
                    resident.engine.abort(request.id)

    def _collect_loads(self) -> None:
        for key, load in list(self._loads.items()):
            if not load.done():
                continue
            del self._loads[key], self._load_bytes[key]
            error = load.exception()
            if error is None:
                self._welcome(key, load.result())
                continue
            log.error("model_load_failed", weights=key, exc_info=error)
            shown = (
                error
                if isinstance(error, ServeError)
                else ModelLoadFailed(f"the model cannot be loaded: {error}")
            )
            for parked in [p for p in self._parked.values() if p.request.weights.key == key]:
                self._fail(parked.request, shown)

    def _welcome(self, key: str, loaded: LoadedModel) -> None:
        engine = TransformersEngine(
            loaded.model,
            loaded.tokenizer,
            max_running=self.max_running,
            max_context_tokens=self.max_context_tokens,
            clock=self.clock,
        )
        self._make_room(loaded.num_bytes)
        self._residents[key] = _Resident(engine, loaded.num_bytes, self.clock())
        log.info("model_loaded", weights=key, num_bytes=loaded.num_bytes)

    def _place_parked(self) -> None:
        now = self.clock()
        for parked in list(self._parked.values()):
            request, key = parked.request, parked.request.weights.key
            if (resident := self._residents.get(key)) is not None:
                del self._parked[request.id]
                self._add(resident, request)
            elif request.deadline_at < now:
                self._fail(request, DeadlinePassed("the request's time is up; retry"))
            elif request.weights.bytes > self.resident_bytes:
                limit = self.resident_bytes
                self._fail(
                    request, ModelTooLarge(f"its {request.weights.bytes} bytes exceed the limit of {limit}")
                )
            elif parked.waits_until <= now:
                self._fail(request, ModelLoading(f"model {request.model} is still loading; retry shortly"))
            elif key not in self._loads and self._make_room(request.weights.bytes):
                self._start_load(request.weights)

    def _add(self, resident: _Resident, request: GenerateRequest) -> None:
        resident.used_at = self.clock()
        try:
            resident.engine.add(request)
        except Exception as error:  # the engine thread's edge: one request must not end the others
            log.error("request_refused", request=request.id, exc_info=error)
            self._fail(request, ServeError("the engine could not take this request; its log has the reason"))

    def _start_load(self, weights: ArtifactRef) -> None:
        log.info("model_loading", weights=weights.key, num_bytes=weights.bytes)
        load = self._pool.submit(lambda: load_model(self.loader(weights), device=self.device))
        self._loads[weights.key], self._load_bytes[weights.key] = load, weights.bytes
        load.add_done_callback(lambda _: self._bell.set())

    def _make_room(self, num_bytes: int) -> bool:
        """Evicts idle models until so many bytes fit; gives whether they do."""
        taken = sum(r.num_bytes for r in self._residents.values()) + sum(self._load_bytes.values())
        idle = [key for key, resident in self._residents.items() if not resident.engine.has_work()]
        idle.sort(key=lambda key: self._residents[key].used_at)
        reclaimable = sum(self._residents[key].num_bytes for key in idle)
        if taken - reclaimable + num_bytes > self.resident_bytes:
            return False  # busy models stay, so evicting idle ones would not help
        for key in idle:
            if taken + num_bytes <= self.resident_bytes:
                break
            taken -= self._residents.pop(key).num_bytes
            log.info("model_evicted", weights=key)
        return True

    def _step(self, key: str, engine: Engine) -> None:
        try:
            replies = engine.step()
        except Exception as error:  # the engine thread's edge: one model must not end the others
            log.error("engine_failed", weights=key, exc_info=error)
            del self._residents[key]  # its batch is in an unknown state; the next request loads it anew
            for request in [r for r in self._requests.values() if r.weights.key == key]:
                self._fail(request, ServeError("the engine failed on this batch; retry"))
            return
        for reply in replies:
            request = self._requests[reply.id]
            self._outbox.append(Addressed(request.reply_to, reply))
            if not isinstance(reply, Delta):
                del self._requests[reply.id]

    def _fail(self, request: GenerateRequest, error: ServeError) -> None:
        self._requests.pop(request.id, None)
        self._parked.pop(request.id, None)
        self._outbox.append(Addressed(request.reply_to, failure_of(request.id, error)))

    def _snapshot(self) -> HostStatus:
        engines = [resident.engine for resident in self._residents.values()]
        return HostStatus(
            resident=tuple(self._residents),
            loading=tuple(self._loads),
            num_running=sum(engine.num_running for engine in engines),
            num_waiting=sum(engine.num_waiting for engine in engines) + len(self._parked),
            last_step_at=self.clock(),
        )
