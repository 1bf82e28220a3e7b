"""Passes requests to the engines of their models and steps all engines, while models load."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import structlog

from app.contracts.control import EngineLoad, Keep, Load, ModelState, ServedModel, Unload
from app.contracts.generation import Delta, GenerateRequest, Reply
from app.contracts.messages import ArtifactRef
from worker.serve.decoding.cursor_batch import Steps
from worker.serve.engine import Engine
from worker.serve.errors import DeadlinePassed, ModelLoading, ModelTooLarge, ServeError, failure_of
from worker.serve.host.answer_checks import AnswerChecks
from worker.serve.host.engine_factory import EngineLimits, Fetch, Precision
from worker.serve.host.engine_loads import engine_loads
from worker.serve.host.model_cache import ModelCache
from worker.serve.text.tokenizer_threads import PromptThreads, Replies, Tokens

log = structlog.get_logger()


class Addressed(NamedTuple):
    """A reply and the API process that waits for it."""

    reply_to: str
    reply: Reply


@dataclass(frozen=True)
class HostStatus:
    """Snapshot for the heartbeat, which names models by their serving key.

    `last_step_at` is the end of the last forward pass, in seconds since the epoch.
    """

    models: tuple[ModelState, ...] = ()
    loads: tuple[EngineLoad, ...] = ()
    num_running: int = 0
    num_waiting: int = 0
    last_step_at: float | None = None

    @property
    def resident(self) -> tuple[str, ...]:
        return tuple(model.serving_key for model in self.models if model.state == "resident")

    @property
    def loading(self) -> tuple[str, ...]:
        return tuple(model.serving_key for model in self.models if model.state == "loading")


@dataclass
class _Parked:
    """A request that waits for its model to load, or for its prompt to be tokenised."""

    request: GenerateRequest
    waits_until: float
    is_tokenising: bool = False


@dataclass
class ModelHost:
    """Engines by serving key, and their requests.

    `step_all` and `close` belong to one thread. The other public methods may be called from any
    thread. `loader` returns the local folder of an artifact and runs in the loading thread.
    `retain` is called with all artifacts that are resident or being loaded, whenever they change.
    """

    resident_bytes: int
    loader: Fetch
    max_running: int = 32
    max_context_tokens: int = 2048
    model_load_wait_seconds: float = 30.0
    device: str = "cpu"
    precision: Precision = "float32"
    steps: Steps = "auto"
    clock: Callable[[], float] = time.time
    retain: Callable[[frozenset[ArtifactRef]], None] = lambda artifacts: None
    _inbox: "queue.SimpleQueue[GenerateRequest | str | Load | Unload | Keep]" = field(
        default_factory=queue.SimpleQueue, init=False
    )
    _wake_event: threading.Event = field(default_factory=threading.Event, init=False)
    _parked: dict[str, _Parked] = field(default_factory=dict, init=False)
    # number of each tenant's last load
    _load_turns: dict[str, int] = field(default_factory=dict, init=False)
    _requests: dict[str, GenerateRequest] = field(default_factory=dict, init=False)
    _outbox: list[Addressed] = field(default_factory=list, init=False)
    _last_step_at: float | None = field(default=None, init=False)
    # serving keys whose artifacts are retained
    _held: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        limits = EngineLimits(
            self.max_running,
            self.max_context_tokens,
            self.device,
            self.clock,
            self.precision,
            self.steps,
        )
        self._model_cache = ModelCache(
            self.resident_bytes,
            self.loader,
            limits,
            wake_up=self._wake_event.set,
            has_new_requests=self._is_tokenising,
        )
        self._prompts = PromptThreads(self._wake_event.set)
        self._answer_checks = AnswerChecks(self._wake_event.set)
        self._status = HostStatus()

    def submit(self, request: GenerateRequest) -> None:
        """Queues a request and loads its model if needed. Errors are reported as a Failure."""
        self._put(request)

    def abort(self, request_id: str) -> None:
        """Ends a request without a reply, at the next `step_all`."""
        self._put(request_id)

    def tell(self, message: Load | Unload | Keep) -> None:
        """Loads, unloads or pins models. The status shows the result."""
        self._put(message)

    def status(self) -> HostStatus:
        """Returns the status at the end of the last `step_all`."""
        return self._status

    def has_work(self) -> bool:
        """Returns whether a request is in progress, or a message or a finished load is waiting."""
        return bool(self._requests) or self._can_step()

    def wait_for_work(self, timeout_seconds: float) -> bool:
        """Waits until there is something to step or the time is up. Returns whether there is."""
        if not self._can_step():
            self._wake_event.wait(timeout_seconds)
        return self._can_step()

    def step_all(self) -> list[Addressed]:
        """Runs one step of every engine that has work, and returns all replies that are due."""
        self._wake_event.clear()
        self._read_inbox()
        for serving_key, error in self._model_cache.collect(self._is_awaited):
            for parked in [
                p for p in self._parked.values() if p.request.serving_key == serving_key
            ]:
                self._fail(parked.request, error)
        self._place_tokenised()
        self._place_parked()
        self._send_checked()
        self._model_cache.tidy()
        for serving_key, resident in self._model_cache:
            if resident.engine.has_work():
                resident.used_at = self.clock()
                self._step(serving_key, resident.engine)
        self._retain_artifacts()
        replies, self._outbox = self._outbox, []
        self._status = self._snapshot()
        return replies

    def close(self) -> None:
        """Ends the other threads. Requests in progress get no reply."""
        self._prompts.close()
        self._answer_checks.close()
        self._model_cache.close()

    def _put(self, message: GenerateRequest | str | Load | Unload | Keep) -> None:
        self._inbox.put(message)
        self._wake_event.set()

    def _can_step(self) -> bool:
        is_stepping = any(resident.engine.has_work() for _, resident in self._model_cache)
        has_news = (
            self._model_cache.has_loaded()
            or self._prompts.has_result()
            or self._answer_checks.has_result()
            or not self._inbox.empty()
        )
        return is_stepping or has_news

    def _read_inbox(self) -> None:
        while not self._inbox.empty():
            match self._inbox.get():
                case GenerateRequest() as request:
                    if request.id not in self._requests:  # otherwise it was delivered twice
                        self._requests[request.id] = request
                        waits_until = self.clock() + self.model_load_wait_seconds
                        self._parked[request.id] = _Parked(request, waits_until)
                case Load(served=served):
                    self._model_cache.want(served)
                case Unload(serving_key=serving_key):
                    self._model_cache.unload(serving_key)
                case Keep(models=models):
                    self._model_cache.keep(models)
                case request_id:
                    self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        self._unpark(request_id)
        self._answer_checks.forget(request_id)
        if (
            request is not None
            and (engine := self._model_cache.engine_of(request.serving_key)) is not None
        ):
            engine.abort(request_id)

    def _unpark(self, request_id: str) -> None:
        parked = self._parked.pop(request_id, None)
        if parked is not None and parked.is_tokenising:
            self._prompts.cancel(request_id)

    def _is_tokenising(self, serving_key: str) -> bool:
        return any(
            p.is_tokenising and p.request.serving_key == serving_key for p in self._parked.values()
        )

    def _is_awaited(self, serving_key: str) -> bool:
        return any(parked.request.serving_key == serving_key for parked in self._parked.values())

    def _place_parked(self) -> None:
        """Has prompts tokenised and models loaded.

        The tenant whose last load was started longest ago comes first.
        """
        now = self.clock()
        if not self._parked:
            self._load_turns.clear()
        for parked in sorted(
            self._parked.values(), key=lambda p: self._load_turns.get(p.request.tenant, 0)
        ):
            request = parked.request
            if request.deadline_at < now:
                self._fail(request, DeadlinePassed("the request timed out; retry"))
            elif parked.is_tokenising:
                continue
            elif (resident := self._model_cache.find(request.serving_key)) is not None:
                parked.is_tokenising = True
                resident.used_at = now
                engine = resident.engine
                is_prompt = request.task == "generate"
                tokenise = engine.prompt_of if is_prompt else engine.tokenizer_replies
                self._prompts.add(request, tokenise)
            else:
                self._wait(parked, now)

    def _wait(self, parked: _Parked, now: float) -> None:
        request = parked.request
        try:
            if self._model_cache.ask(served_of(request)):
                self._load_turns[request.tenant] = max(self._load_turns.values(), default=0) + 1
        except ModelTooLarge as error:
            self._fail(request, error)
        else:
            if parked.waits_until <= now:  # the load continues, for retries
                self._fail(
                    request, ModelLoading(f"model {request.model} is still loading; retry shortly")
                )

    def _place_tokenised(self) -> None:
        for request, result in self._prompts.take():
            parked = self._parked.get(request.id)
            if parked is None or parked.request is not request:
                continue  # it was cancelled
            parked.is_tokenising = False
            if isinstance(result, ServeError):
                self._fail(request, result)
            elif request.task != "generate":
                self._reply(request, cast("Replies", result))
            elif (engine := self._model_cache.engine_of(request.serving_key)) is not None:
                del self._parked[request.id]
                self._add(engine, request, cast("Tokens", result))

    def _reply(self, request: GenerateRequest, replies: Replies) -> None:
        """Ends a request that no engine has to answer."""
        del self._parked[request.id], self._requests[request.id]
        self._outbox += [Addressed(request.reply_to, reply) for reply in replies]

    def _add(self, engine: Engine, request: GenerateRequest, prompt: Tokens) -> None:
        try:
            engine.add(request, prompt)
        except ServeError as error:
            self._fail(request, error)
        except Exception as error:  # one request must not end the others
            log.error("request_refused", request=request.id, exc_info=error)
            self._fail(
                request,
                ServeError(
                    "the engine could not process this request; the worker's log shows the reason"
                ),
            )

    def _step(self, serving_key: str, engine: Engine) -> None:
        is_pass = engine.num_running + engine.num_waiting > 0
        try:
            replies = engine.step()
        except Exception as error:  # one model must not end the others
            log.error("engine_failed", serving_key=serving_key, exc_info=error)
            # The state of its batch is unknown. The next request loads the model again.
            self._model_cache.drop(serving_key)
            begun = [
                request for request in self._requests.values() if request.id not in self._parked
            ]
            for request in [request for request in begun if request.serving_key == serving_key]:
                self._fail(
                    request, ServeError("the engine failed while it processed this batch; retry")
                )
            return
        if is_pass:
            self._last_step_at = self.clock()
        for reply in replies:
            request = self._requests[reply.id]
            self._send(request, self._answer_checks.pass_on(request, reply))

    def _send(self, request: GenerateRequest, replies: list[Reply]) -> None:
        for reply in replies:
            self._outbox.append(Addressed(request.reply_to, reply))
            if not isinstance(reply, Delta):
                del self._requests[reply.id]

    def _send_checked(self) -> None:
        for request, replies, error in self._answer_checks.take():
            if error is None:
                self._send(request, replies)
                continue
            if (engine := self._model_cache.engine_of(request.serving_key)) is not None:
                engine.abort(request.id)  # its other choices
            self._fail(request, error)

    def _retain_artifacts(self) -> None:
        held = self._model_cache.serving_keys()
        if held != self._held:
            self._held = held
            self.retain(self._model_cache.artifacts())

    def _fail(self, request: GenerateRequest, error: ServeError) -> None:
        self._requests.pop(request.id, None)
        self._unpark(request.id)
        self._answer_checks.forget(request.id)
        self._outbox.append(Addressed(request.reply_to, failure_of(request.id, error)))

    def _snapshot(self) -> HostStatus:
        residents = [resident for _, resident in self._model_cache]
        engines = [resident.engine for resident in residents]
        return HostStatus(
            models=self._model_cache.states(),
            loads=engine_loads(residents, (parked.request for parked in self._parked.values())),
            num_running=sum(engine.num_running for engine in engines),
            num_waiting=sum(engine.num_waiting for engine in engines) + len(self._parked),
            last_step_at=self._last_step_at,
        )


def served_of(request: GenerateRequest) -> ServedModel:
    """Returns the model and serving options that a request needs."""
    return ServedModel(model=request.model, weights=request.weights, serving=request.serving)
