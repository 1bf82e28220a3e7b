"""Cache of engines within a memory limit: loads, pins, unloads and evicts models."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import structlog

from app.contracts.control import ModelState, ServedModel
from app.contracts.generation import LoadedWeights
from app.contracts.messages import ArtifactRef
from worker.serve.device_memory import is_out_of_memory
from worker.serve.engine import Engine
from worker.serve.errors import ModelLoadFailed, ModelTooLarge, OutOfMemory, ServeError
from worker.serve.host.engine_factory import (
    EngineLimits,
    Fetch,
    LoadProgress,
    Ready,
    make_ready,
    watch_loads,
)
from worker.serve.speculative import SpeculativeEngine

log = structlog.get_logger()

RETRY_SECONDS = 60.0  # before a pinned model that failed to load is tried again
MAX_FAILURES = 16  # that are remembered, for the status only


@dataclass
class Resident:
    """An engine that can take requests. `num_bytes` is the size of its weights."""

    served: ServedModel
    engine: Engine
    num_bytes: int
    load_seconds: float
    first_token_seconds: float | None
    weights: LoadedWeights
    used_at: float

    @property
    def total_bytes(self) -> int:
        return self.num_bytes + self.engine.cache_bytes

    @property
    def acceptance_rate(self) -> float | None:
        """Fraction of the draft's tokens that were accepted so far, or None without a draft."""
        if (
            not isinstance(self.engine, SpeculativeEngine)
            or not self.engine.draft_counts.num_proposed
        ):
            return None
        return self.engine.draft_counts.acceptance_rate


@dataclass
class _Load:
    served: ServedModel
    progress: LoadProgress
    future: "Future[Ready]"
    num_bytes: int  # expected


@dataclass
class _Failed:
    served: ServedModel
    error: ServeError
    at: float


@dataclass
class ModelCache:
    """Engines by serving key (`serving_key`), within `resident_bytes` bytes.

    Weights and KV caches count. Caches of idle engines are freed before an engine is evicted.

    One thread owns the cache. `wake_up` is called from the loading thread when a load has ended.
    `has_new_requests` returns whether requests are about to be added to an engine, which then stays.
    """

    resident_bytes: int
    fetch: Fetch
    limits: EngineLimits
    wake_up: Callable[[], None]
    has_new_requests: Callable[[str], bool]
    _residents: dict[str, Resident] = field(default_factory=dict, init=False)
    _loads: dict[str, _Load] = field(default_factory=dict, init=False)
    # models to load that no request waits for
    _wanted: dict[str, ServedModel] = field(default_factory=dict, init=False)
    _pinned: dict[str, ServedModel] = field(default_factory=dict, init=False)
    _leaving: set[str] = field(default_factory=set, init=False)
    _failed: dict[str, _Failed] = field(default_factory=dict, init=False)
    _true_bytes: dict[str, int] = field(default_factory=dict, init=False)  # of models loaded before

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="load")

    def __iter__(self) -> Iterator[tuple[str, Resident]]:
        """Iterates over all engines. Those that are leaving still have to finish their requests."""
        return iter(list(self._residents.items()))

    def find(self, serving_key: str) -> Resident | None:
        """Returns the engine for a new request, or None. An engine that is leaving takes none."""
        return None if serving_key in self._leaving else self._residents.get(serving_key)

    def engine_of(self, serving_key: str) -> Engine | None:
        """Returns the engine that runs requests for a serving key, even if it is leaving."""
        resident = self._residents.get(serving_key)
        return resident.engine if resident else None

    def ask(self, served: ServedModel) -> bool:
        """Starts to load a model if there is room and no other load is running.

        It is called again until the model is resident. Returns whether this call started the load.
        Raises ModelTooLarge.
        """
        key, num_bytes = served.serving_key, self._expected_bytes(served)
        if key in self._residents or key in self._loads:
            return False
        kept = sum(
            map(self._expected_bytes, (p for other, p in self._pinned.items() if other != key))
        )
        if num_bytes > self.resident_bytes - kept:
            limit = f"the limit of {self.resident_bytes}" + (
                f", minus {kept} for pinned models" if kept else ""
            )
            raise ModelTooLarge(f"the model has {num_bytes} bytes, which exceeds {limit}")
        if self._loads or not self._make_room(num_bytes):
            return False
        self._start(served, num_bytes)
        return True

    def want(self, served: ServedModel) -> None:
        """Requests a load that no request waits for. `tidy` starts it when there is room."""
        self._leaving.discard(served.serving_key)
        if (resident := self._residents.get(served.serving_key)) is not None:
            resident.used_at = self.limits.clock()
        elif served.serving_key not in self._loads:
            self._wanted[served.serving_key] = served

    def unload(self, serving_key: str) -> None:
        """Removes an engine when it has finished its requests.

        A load in progress is discarded when it ends, unless a request waits for it.
        """
        self._wanted.pop(serving_key, None)
        self._failed.pop(serving_key, None)
        if serving_key in self._residents or serving_key in self._loads:
            self._leaving.add(serving_key)

    def keep(self, models: tuple[ServedModel, ...]) -> None:
        """Pins these models and unpins all others."""
        self._pinned = {served.serving_key: served for served in models}
        self._leaving -= self._pinned.keys()

    def has_loaded(self) -> bool:
        """Returns whether `collect` would find a load that has ended. Thread-safe."""
        return any(load.future.done() for load in list(self._loads.values()))

    def collect(self, is_awaited: Callable[[str], bool]) -> list[tuple[str, ServeError]]:
        """Takes in the loads that have ended. Returns the keys and errors of failed loads."""
        failures = []
        for key, load in list(self._loads.items()):
            if not load.future.done():
                continue
            del self._loads[key]
            try:
                self._take_in(load, load.future.result(), is_awaited(key))
            except BaseException as error:  # a loader may raise anything, even a Rust panic
                log.error("model_load_failed", serving_key=key, exc_info=error)
                shown = _shown(error)
                self._note(load.served, shown)
                failures.append((key, shown))
        return failures

    def tidy(self) -> None:
        """Removes idle engines that are leaving, and loads wanted and pinned models that fit."""
        for key in list(self._leaving):
            resident = self._residents.get(key)
            if resident is not None and not self._is_busy(key):
                self.drop(key)
                log.info("model_unloaded", serving_key=key)
        if self._taken_bytes() > self.resident_bytes:
            self._make_room(0)
        self._limit_caches()
        now = self.limits.clock()
        for key, served in [*self._wanted.items(), *self._pinned.items()]:
            failed = self._failed.get(key)
            if key not in self._wanted and failed is not None and now - failed.at < RETRY_SECONDS:
                continue
            try:
                self.ask(served)
            except ModelTooLarge as error:
                self._note(served, error)
                self._wanted.pop(key, None)
            if key in self._loads or key in self._residents:
                self._wanted.pop(key, None)

    def drop(self, serving_key: str) -> None:
        """Removes an engine at once, with its requests."""
        self._residents.pop(serving_key, None)
        self._leaving.discard(serving_key)

    def serving_keys(self) -> frozenset[str]:
        """Returns the serving keys that are resident or being loaded."""
        return frozenset(self._residents) | frozenset(self._loads)

    def artifacts(self) -> frozenset[ArtifactRef]:
        """Returns the artifacts, with drafts, of all engines that are resident or being loaded."""
        served = [resident.served for resident in self._residents.values()]
        served += [load.served for load in self._loads.values()]
        drafts = [each.serving.draft.weights for each in served if each.serving.draft is not None]
        return frozenset([*(each.weights for each in served), *drafts])

    def states(self) -> tuple[ModelState, ...]:
        """Returns the states of all models, for the heartbeat."""
        found = [
            ModelState(
                serving_key=key,
                state="resident",
                bytes=resident.total_bytes,
                percent=100.0,
                weights=resident.weights,
                load_seconds=resident.load_seconds,
                first_token_seconds=resident.first_token_seconds,
                acceptance_rate=resident.acceptance_rate,
                is_pinned=key in self._pinned,
            )
            for key, resident in self._residents.items()
        ]
        loads = [(key, load.served, load.progress.percent) for key, load in self._loads.items()]
        loads += [(key, served, 0.0) for key, served in self._wanted.items()]
        for key, served, percent in loads:
            is_pinned = key in self._pinned
            state = ModelState(
                serving_key=key, state="loading", bytes=served.stored_bytes, is_pinned=is_pinned
            )
            found.append(state.model_copy(update={"percent": percent}))
        for key, failed in self._failed.items():
            size, is_pinned = failed.served.stored_bytes, key in self._pinned
            state = ModelState(serving_key=key, state="failed", bytes=size, is_pinned=is_pinned)
            found.append(state.model_copy(update={"error": str(failed.error)}))
        return tuple(found)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, served: ServedModel, num_bytes: int) -> None:
        log.info("model_loading", serving_key=served.serving_key, num_bytes=num_bytes)
        progress = LoadProgress(served.stored_bytes)
        future = self._pool.submit(
            _in_a_thread, partial(make_ready, served, self.fetch, self.limits, progress)
        )
        self._loads[served.serving_key] = _Load(served, progress, future, num_bytes)
        self._failed.pop(served.serving_key, None)
        future.add_done_callback(lambda _: self.wake_up())

    def _take_in(self, load: _Load, ready: Ready, is_awaited: bool) -> None:
        key = load.served.serving_key
        self._true_bytes[key] = ready.num_bytes
        if key in self._leaving:
            self._leaving.discard(key)
            if not is_awaited:
                return
        if ready.num_bytes > self.resident_bytes:
            raise ModelTooLarge(
                f"the loaded model has {ready.num_bytes} bytes, which exceeds the limit of {self.resident_bytes}"
            )
        self._make_room(ready.num_bytes)
        self._residents[key] = Resident(load.served, *ready, used_at=self.limits.clock())
        log.info(
            "model_loaded",
            serving_key=key,
            num_bytes=ready.num_bytes,
            seconds=round(ready.load_seconds, 3),
        )

    def _note(self, served: ServedModel, error: ServeError) -> None:
        self._failed.pop(served.serving_key, None)
        self._failed[served.serving_key] = _Failed(served, error, self.limits.clock())
        while len(self._failed) > MAX_FAILURES:
            del self._failed[next(iter(self._failed))]

    def _expected_bytes(self, served: ServedModel) -> int:
        return self._true_bytes.get(served.serving_key, served.stored_bytes)

    def _taken_bytes(self) -> int:
        return sum(resident.total_bytes for resident in self._residents.values()) + sum(
            load.num_bytes for load in self._loads.values()
        )

    def _limit_caches(self) -> None:
        """Gives each engine the memory that is left beside weights and engines that must stay."""
        kept = {}
        for key, resident in self._residents.items():
            if self._is_busy(key):
                kept[key] = resident.total_bytes
            elif key in self._pinned:
                kept[key] = resident.num_bytes
        taken = sum(kept.values()) + sum(load.num_bytes for load in self._loads.values())
        for key, resident in self._residents.items():
            others = taken - kept.get(key, 0)
            resident.engine.limit_cache(self.resident_bytes - others - resident.num_bytes)

    def _is_busy(self, serving_key: str) -> bool:
        return self._residents[serving_key].engine.has_work() or self.has_new_requests(serving_key)

    def _make_room(self, num_bytes: int) -> bool:
        """Evicts idle models, least recently used first, until `num_bytes` more bytes fit.

        Their caches are freed first. Returns whether the bytes fit. If not, nothing is evicted.
        """
        idle = [key for key in self._residents if not self._is_busy(key)]
        if self._taken_bytes() + num_bytes > self.resident_bytes:
            for key in idle:
                self._residents[key].engine.free_cache()
        taken = self._taken_bytes()
        idle = [key for key in idle if key not in self._pinned]
        idle.sort(key=lambda key: self._residents[key].used_at)
        reclaimable = sum(self._residents[key].num_bytes for key in idle)
        if taken - reclaimable + num_bytes > self.resident_bytes:
            return False  # busy models stay, so evicting idle ones would not help
        for key in idle:
            if taken + num_bytes <= self.resident_bytes:
                break
            taken -= self._residents[key].num_bytes
            self.drop(key)
            log.info("model_evicted", serving_key=key)
        return True


def _shown(error: BaseException) -> ServeError:
    if isinstance(error, ServeError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(
            "the device has too little free memory for the model; unload other models, or serve it "
            "with smaller weights"
        )
    return ModelLoadFailed(f"the model cannot be loaded: {error}")


def _in_a_thread(work: Callable[[], Ready]) -> Ready:
    """Runs `work` in a new thread that ends with it, as do the OpenMP threads of that thread.

    libgomp threads spin only while there are no more of them than cores. Idle threads left by a
    load would stop the engine's threads from spinning, and slow down every decode step
    (bench/LOG.md).
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load", initializer=watch_loads) as pool:
        return pool.submit(work).result()
