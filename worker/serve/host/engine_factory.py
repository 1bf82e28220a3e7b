"""Creates engines: loads models with their serving options, and reports the progress."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import structlog

from app.contracts.control import ServedModel
from app.contracts.generation import (
    Done,
    Failure,
    GenerateRequest,
    LoadedWeights,
    Sampling,
    ServingOptions,
)
from app.contracts.messages import ArtifactRef
from worker.cpu import HAS_FAST_BFLOAT16
from worker.serve.decoding.cursor_batch import Steps
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.errors import OptionUnavailable
from worker.serve.loading import LoadedModel, load_model
from worker.serve.speculative import SpeculativeEngine
from worker.serve.vllm_core import VllmDraft, can_serve, has_vllm
from worker.serve.vllm_engine import load_vllm

log = structlog.get_logger(__name__)

T = TypeVar("T")
Fetch = Callable[[ArtifactRef], Path]
Precision = Literal["auto", "float32"]

READ_PERCENT = 90.0  # the rest is for packing the weights and the warm-up
WARM_UP_SECONDS = 120.0
_thread = threading.local()  # .progress: of the load that runs in this thread
_TQDM_LOCK = threading.RLock()


@dataclass(frozen=True)
class EngineLimits:
    """Settings that all engines of a worker share.

    `clock` returns seconds since the epoch. `precision` applies to models whose weights option is
    `auto`. `steps` says how our engine decodes.
    """

    max_running: int
    max_context_tokens: int
    device: str
    clock: Callable[[], float]
    precision: Precision = "float32"
    steps: Steps = "auto"

    def weights_for(self, options: ServingOptions) -> LoadedWeights:
        """Returns the format in which the weights are loaded.

        With a draft, `auto` does not choose bfloat16: ties are more frequent there, and a draft
        must not change the text.
        """
        if options.weights != "auto":
            return options.weights
        is_rounded = self.precision == "auto" and self.device == "cpu" and HAS_FAST_BFLOAT16
        return "bfloat16" if is_rounded and options.draft is None else "plain"


@dataclass
class LoadProgress:
    """Progress of one load. The loading thread writes it, and other threads read it."""

    total_bytes: int
    _done_bytes: float = field(default=0.0, init=False)
    _folder_bytes: int = field(default=0, init=False)
    _fraction: float = field(default=0.0, init=False)  # of the current folder

    @property
    def percent(self) -> float:
        read = self._done_bytes + self._fraction * self._folder_bytes
        return READ_PERCENT * min(1.0, read / max(1, self.total_bytes))

    @contextmanager
    def reading(self, num_bytes: int) -> Iterator[None]:
        """Context manager in which this thread reads a folder of `num_bytes` bytes."""
        self._folder_bytes, _thread.progress = num_bytes, self
        try:
            yield
        finally:
            _thread.progress = None
            self._fraction = 0.0
            self._done_bytes += num_bytes

    def counted(self, things: Iterable[T], total: int) -> Iterator[T]:
        """Yields the items, and updates the progress before each of them."""
        for number, thing in enumerate(things):
            self._fraction = number / total
            yield thing


class Ready(NamedTuple):
    """An engine that has completed its warm-up.

    `first_token_seconds` is None if the warm-up failed or took too long.
    """

    engine: Engine
    num_bytes: int
    load_seconds: float
    first_token_seconds: float | None
    weights: LoadedWeights


def make_ready(
    served: ServedModel, fetch: Fetch, limits: EngineLimits, progress: LoadProgress
) -> Ready:
    """Returns the engine for a model, loaded and warmed up. Raises ServeError."""
    began = time.perf_counter()
    engine, num_bytes = engine_for(served, fetch, limits, progress)
    load_seconds = time.perf_counter() - began
    first_token = first_token_seconds(engine, served, limits.clock)
    return Ready(engine, num_bytes, load_seconds, first_token, limits.weights_for(served.serving))


def engine_for(
    served: ServedModel, fetch: Fetch, limits: EngineLimits, progress: LoadProgress
) -> tuple[Engine, int]:
    """Returns the engine for the serving options, and its size in bytes. Raises ServeError."""
    options = served.serving
    if options.engine == "vllm" or (
        options.engine == "auto" and prefers_vllm(served, fetch, limits)
    ):
        return _in_vllm(served, fetch, limits, progress)
    loaded = _load(served.weights, fetch, limits, progress, limits.weights_for(options))
    given: dict[str, Any] = {  # Any: fields of an engine
        "clock": limits.clock,
        "max_running": limits.max_running,
        "max_context_tokens": limits.max_context_tokens,
        "steps": limits.steps,
    }
    if options.draft is None:
        plain = TransformersEngine(loaded.model, loaded.tokenizer, **given)
        plain.prepare_grammars()
        return plain, loaded.num_bytes
    draft = _load(options.draft.weights, fetch, limits, progress)
    num_draft_tokens = options.draft.num_tokens
    engine = SpeculativeEngine(
        loaded.model, loaded.tokenizer, draft=draft, num_draft_tokens=num_draft_tokens, **given
    )
    engine.prepare_grammars()
    return engine, loaded.num_bytes + draft.num_bytes


def prefers_vllm(served: ServedModel, fetch: Fetch, limits: EngineLimits) -> bool:
    """Returns whether `auto` means vLLM: on CUDA, for models and options that it fully supports.

    With a draft, vLLM refuses some sampling parameters.
    """
    options = served.serving
    if limits.device == "cpu" or options.draft is not None:
        return False
    is_plain = options.weights in ("auto", "plain")
    is_preferred = is_plain and has_vllm() and can_serve(fetch(served.weights))
    log.info("engine_chosen", model=served.model, is_vllm=is_preferred)
    return is_preferred


def _in_vllm(
    served: ServedModel, fetch: Fetch, limits: EngineLimits, progress: LoadProgress
) -> tuple[Engine, int]:
    options = served.serving
    if options.weights not in ("auto", "plain"):
        raise OptionUnavailable(
            "vLLM only supports weights 'plain'; serve the model without this option"
        )
    folder = fetch(served.weights)
    draft = None
    if options.draft is not None:
        draft = VllmDraft(fetch(options.draft.weights), options.draft.num_tokens)
    with progress.reading(served.stored_bytes):
        return load_vllm(
            folder,
            draft=draft,
            max_running=limits.max_running,
            max_context_tokens=limits.max_context_tokens,
            clock=limits.clock,
        )


def _load(
    ref: ArtifactRef,
    fetch: Fetch,
    limits: EngineLimits,
    progress: LoadProgress,
    weights: LoadedWeights = "plain",
) -> LoadedModel:
    folder = fetch(ref)
    with progress.reading(ref.bytes):
        # an engine only calls the model, so it does not need the plain weights
        return load_model(folder, device=limits.device, weights=weights, keeps_plain=False)


def first_token_seconds(
    engine: Engine, served: ServedModel, clock: Callable[[], float]
) -> float | None:
    """Returns the time from a short prompt to its first token, or None if there is none in time.

    The engine must have no other work. A first request, for the warm-up, is not measured.
    """
    seconds = 0.0
    for name in ("warm-up", "measured"):
        began = time.perf_counter()
        engine.add(
            GenerateRequest(
                id=name,
                reply_to="",
                model=served.model,
                weights=served.weights,
                serving=served.serving,
                text="Once upon a time",
                sampling=Sampling(max_tokens=1, temperature=0.0, ignore_eos=True),
                deadline_at=clock() + WARM_UP_SECONDS,
            )
        )
        while not (ends := [reply for reply in engine.step() if isinstance(reply, Done | Failure)]):
            if time.perf_counter() - began > WARM_UP_SECONDS:
                engine.abort(name)
                return None
        if isinstance(ends[0], Failure):
            return None
        seconds = time.perf_counter() - began
    return seconds


def _watch(
    bar: Callable[..., Any], args: Any, kwargs: Any
) -> Any:  # Any: the hook of transformers is untyped
    progress: LoadProgress | None = getattr(_thread, "progress", None)
    if progress is None or kwargs.get("desc") != "Loading weights":
        return bar(*args, **kwargs)
    return bar(
        progress.counted(args[0], len(args[0])), *args[1:], **{"total": len(args[0]), **kwargs}
    )


def watch_loads() -> None:
    """Reports the progress of loads, which transformers shows only in its progress bars."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]  # it has no type hints
    from transformers.utils import logging  # slow to import, needed for loading only

    # The default lock is shared with forked processes. A process that is killed while it holds the
    # lock would block every load.
    tqdm.set_lock(_TQDM_LOCK)
    logging.set_tqdm_hook(_watch)
