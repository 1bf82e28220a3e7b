"""The model host: loading beside stepping, eviction by bytes, and every way a load can end."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.contracts.control import EngineLoad, Keep, Load, ServedModel, Unload
from app.contracts.generation import Delta, Done, Failure, GenerateRequest, Reply, ServingOptions
from app.contracts.messages import ArtifactRef
from worker.serve.errors import ModelLoadFailed
from worker.serve.host.model_host import Addressed, ModelHost
from worker.serve.loading import load_model

Make = Callable[..., GenerateRequest]
SIZE = 2_000_000  # bytes each model is said to have; more than the real ones have


def ref(name: str, num_bytes: int = SIZE) -> ArtifactRef:
    return ArtifactRef(key=name, bytes=num_bytes)


class Shelf:
    """A loader whose models can be held back, and that remembers what was asked of it."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.asked: list[str] = []
        self.gates: dict[str, threading.Event] = {}

    def __call__(self, weights: ArtifactRef) -> Path:
        self.asked.append(weights.key)
        self.asked_by = threading.current_thread()
        if weights.key in self.gates:
            assert self.gates[weights.key].wait(20)
        if weights.key not in self.folders:
            raise ModelLoadFailed(f"{weights.key} is not in the store")
        return self.folders[weights.key]


@pytest.fixture
def shelf(tiny_llama_dir: Path, tiny_gpt2_dir: Path) -> Shelf:
    return Shelf({"llama": tiny_llama_dir, "gpt2": tiny_gpt2_dir, "twin": tiny_llama_dir})


@pytest.fixture
def make_host(shelf: Shelf) -> Iterator[Callable[..., ModelHost]]:
    hosts: list[ModelHost] = []

    def make(**given: Any) -> ModelHost:  # Any: the host's own fields
        options: dict[str, Any] = {
            "resident_bytes": 10 * SIZE,
            "loader": shelf,
            "max_context_tokens": 256,
        }
        hosts.append(ModelHost(**(options | given)))
        return hosts[-1]

    yield make
    for gate in shelf.gates.values():
        gate.set()
    for host in hosts:
        host.close()


@pytest.fixture(scope="module")
def true_bytes(tiny_llama_dir: Path, tiny_gpt2_dir: Path, tiny_t5_dir: Path) -> dict[str, int]:
    """What the models take in memory."""
    folders = {
        "llama": tiny_llama_dir,
        "gpt2": tiny_gpt2_dir,
        "t5": tiny_t5_dir,
        "twin": tiny_llama_dir,
    }
    return {
        name: load_model(folder, keeps_plain=False).num_bytes for name, folder in folders.items()
    }


def run(host: ModelHost, until: Callable[[list[Addressed]], bool] | None = None) -> list[Addressed]:
    """Steps until the condition holds, or until nothing is under way."""
    found: list[Addressed] = []
    give_up = time.monotonic() + 80
    while host.has_work() and not (until and until(found)):
        assert time.monotonic() < give_up, "the host does not come to an end"
        host.wait_for_work(0.02)
        found += host.step_all()
    return found


def served(name: str, num_bytes: int = SIZE) -> ServedModel:
    return ServedModel(model=name, weights=ref(name, num_bytes))


def settle(host: ModelHost) -> None:
    """Steps until nothing is to be done or loading."""
    host.step_all()
    give_up = time.monotonic() + 80
    while host.has_work() or host.status().loading:
        assert time.monotonic() < give_up, "the host does not settle"
        host.wait_for_work(0.02)
        host.step_all()


def ends(found: list[Addressed]) -> dict[str, Reply]:
    return {reply.id: reply for _, reply in found if not isinstance(reply, Delta)}


def has_ended(name: str) -> Callable[[list[Addressed]], bool]:
    return lambda found: name in ends(found)


def test_who_loads_is_gone_with_its_openmp_threads_when_the_engine_steps(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    host = make_host()
    host.submit(make_request("a", weights=ref("llama")))
    run(host, until=has_ended("a"))
    assert not shelf.asked_by.is_alive()


def test_requests_of_two_models_are_answered_each_by_its_own(
    make_host: Callable[..., ModelHost], make_request: Make
) -> None:
    host = make_host()
    host.submit(make_request("a", weights=ref("llama"), reply_to="api-1"))
    host.submit(make_request("b", weights=ref("gpt2"), reply_to="api-2"))
    found = run(host)
    assert {(home, reply.id) for home, reply in found} == {("api-1", "a"), ("api-2", "b")}
    assert all(isinstance(reply, Done) for reply in ends(found).values())
    texts = {
        name: "".join(r.text for _, r in found if isinstance(r, Delta) and r.id == name)
        for name in "ab"
    }
    assert texts["a"] != texts["b"]


def test_the_artifacts_of_loaded_models_are_retained_and_let_go_with_them(
    make_host: Callable[..., ModelHost],
) -> None:
    retained: list[frozenset[ArtifactRef]] = []
    host = make_host(retain=retained.append)
    drafted = ServingOptions.model_validate({"draft": {"model": "twin", "weights": ref("twin")}})
    model = ServedModel(model="llama", weights=ref("llama"), serving=drafted)
    host.tell(Load(served=model))
    settle(host)
    host.tell(Load(served=served("gpt2")))
    settle(host)
    host.tell(Unload(serving_key=model.serving_key))
    settle(host)
    with_draft = {ref("llama"), ref("twin")}
    assert retained == [with_draft, with_draft | {ref("gpt2")}, {ref("gpt2")}]


def test_a_model_is_loaded_once(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    host = make_host()
    for name in "abc":
        host.submit(make_request(name, weights=ref("llama")))
    run(host)
    host.submit(make_request("d", weights=ref("llama")))
    run(host)
    assert shelf.asked == ["llama"]
    assert host.status().resident == ("llama",)


def test_loading_does_not_stop_the_others(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    host = make_host()
    host.submit(make_request("first", weights=ref("llama")))
    run(host)
    shelf.gates["gpt2"] = threading.Event()
    host.submit(make_request("slow", weights=ref("gpt2")))
    host.submit(make_request("second", weights=ref("llama"), max_tokens=30))
    found = run(host, until=has_ended("second"))
    assert set(ends(found)) == {"second"}
    assert host.status().loading == ("gpt2",)
    shelf.gates["gpt2"].set()
    assert set(ends(run(host))) == {"slow"}


def test_a_request_waits_so_long_and_the_load_goes_on(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    shelf.gates["llama"] = threading.Event()
    host = make_host(model_load_wait_seconds=0.1)
    host.submit(make_request("early", weights=ref("llama")))
    early = ends(run(host))["early"]
    assert isinstance(early, Failure)
    assert (early.status, early.code) == (503, "model_loading")
    shelf.gates["llama"].set()
    while not host.status().resident:
        assert host.wait_for_work(10)
        host.step_all()
    host.submit(make_request("late", weights=ref("llama")))
    assert isinstance(ends(run(host))["late"], Done)
    assert shelf.asked == ["llama"]


def test_an_idle_host_sleeps(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    shelf.gates["llama"] = threading.Event()
    host = make_host()
    host.submit(make_request("a", weights=ref("llama")))
    host.step_all()
    host.abort("a")
    host.step_all()
    assert not host.wait_for_work(0.01)
    shelf.gates["llama"].set()
    assert host.wait_for_work(10)  # the load ended; nobody waits for it
    host.step_all()
    assert not host.has_work()
    assert not host.wait_for_work(0.01)


def test_a_failed_load_fails_its_requests_and_may_be_tried_again(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf, tiny_llama_dir: Path
) -> None:
    host = make_host()
    host.submit(make_request("a", weights=ref("missing")))
    host.submit(make_request("b", weights=ref("llama")))
    found = ends(run(host))
    failure = found["a"]
    assert isinstance(failure, Failure)
    assert (failure.status, failure.code) == (503, "model_load_failed")
    assert isinstance(found["b"], Done)
    shelf.folders["missing"] = tiny_llama_dir
    host.submit(make_request("c", weights=ref("missing")))
    assert isinstance(ends(run(host))["c"], Done)


def test_an_unforeseen_fault_of_the_loader_is_a_failed_load(
    make_host: Callable[..., ModelHost], make_request: Make
) -> None:
    def broken(_weights: ArtifactRef) -> Path:
        raise ZeroDivisionError("disk on fire")

    host = make_host(loader=broken)
    host.submit(make_request("a"))
    failure = ends(run(host))["a"]
    assert isinstance(failure, Failure)
    assert (failure.status, failure.code) == (503, "model_load_failed")
    assert "disk on fire" in failure.message


def test_the_least_recently_used_model_makes_room(
    make_host: Callable[..., ModelHost], make_request: Make, true_bytes: dict[str, int]
) -> None:
    now = [1000.0]
    room = true_bytes["llama"] + true_bytes["gpt2"] + true_bytes["twin"] - 1
    host = make_host(resident_bytes=room, clock=lambda: now[0])
    for name, weights in [("a", "llama"), ("b", "gpt2"), ("c", "llama"), ("d", "twin")]:
        now[0] += 1
        host.submit(make_request(name, weights=ref(weights, true_bytes[weights]), deadline_at=2000))
        run(host)
    assert set(host.status().resident) == {"llama", "twin"}


def test_an_encoder_decoder_is_evicted_and_loaded_again(
    make_host: Callable[..., ModelHost],
    make_request: Make,
    shelf: Shelf,
    tiny_t5_dir: Path,
    true_bytes: dict[str, int],
) -> None:
    shelf.folders["t5"] = tiny_t5_dir
    host = make_host(resident_bytes=max(true_bytes.values()))  # room for one
    for number, name in enumerate(("t5", "llama", "t5")):
        host.submit(make_request(f"r{number}", weights=ref(name, true_bytes[name]), tokens=(9, 8)))
        assert isinstance(ends(run(host))[f"r{number}"], Done)
        assert host.status().resident == (name,)
    assert shelf.asked == ["t5", "llama", "t5"]


def test_a_busy_model_is_not_evicted(
    make_host: Callable[..., ModelHost], make_request: Make, true_bytes: dict[str, int]
) -> None:
    sizes = {name: ref(name, true_bytes[name]) for name in ("llama", "gpt2")}
    host = make_host(resident_bytes=true_bytes["llama"] + true_bytes["gpt2"] - 1)
    host.submit(make_request("busy", weights=sizes["llama"], max_tokens=60, ignore_eos=True))
    found = run(host, until=lambda found: bool(found))
    host.submit(make_request("next", weights=sizes["gpt2"]))
    found += run(host)
    assert list(ends(found)) == ["busy", "next"]
    assert all(isinstance(reply, Done) for reply in ends(found).values())
    assert host.status().resident == ("gpt2",)


def test_a_model_over_the_limit_is_refused_and_evicts_nobody(
    make_host: Callable[..., ModelHost], make_request: Make
) -> None:
    host = make_host(resident_bytes=2 * SIZE)
    host.submit(make_request("a", weights=ref("llama")))
    run(host)
    host.submit(make_request("b", weights=ref("gpt2", 3 * SIZE)))
    failure = ends(run(host))["b"]
    assert isinstance(failure, Failure)
    assert failure.code == "model_too_large"
    assert host.status().resident == ("llama",)


def test_abort_reaches_running_and_loading_requests(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    host = make_host()
    host.submit(make_request("running", weights=ref("llama"), max_tokens=200))
    run(host, until=lambda found: bool(found))
    shelf.gates["gpt2"] = threading.Event()
    host.submit(make_request("loading", weights=ref("gpt2")))
    host.step_all()
    host.abort("running")
    host.abort("loading")
    host.abort("unknown")
    assert host.step_all() == []
    assert (host.status().num_running, host.status().num_waiting) == (0, 0)
    assert not host.has_work()


def test_a_request_delivered_twice_is_answered_once(
    make_host: Callable[..., ModelHost], make_request: Make
) -> None:
    host = make_host()
    for _ in range(2):
        host.submit(make_request("a", weights=ref("llama")))
    found = run(host)
    assert len([reply for _, reply in found if isinstance(reply, Done)]) == 1


def test_an_engine_that_breaks_ends_its_requests_only_and_is_loaded_anew(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    host = make_host()
    for name in ("llama", "gpt2"):  # otherwise a may end while the model of b loads
        host.tell(Load(served=served(name)))
    settle(host)
    host.submit(make_request("a", weights=ref("llama"), max_tokens=100))
    host.submit(make_request("b", weights=ref("gpt2"), max_tokens=20))
    run(host, until=lambda found: {reply.id for _, reply in found} == {"a", "b"})
    broken: Any = host._model_cache.engine_of("llama")  # Any: reaches into the engine on purpose
    broken._decoder.batch.cache.layers[0]._buffers.clear()
    found = ends(run(host))
    failure = found["a"]
    assert isinstance(failure, Failure)
    assert (failure.status, failure.code) == (500, "engine_error")
    assert isinstance(found["b"], Done)
    host.submit(make_request("c", weights=ref("llama")))
    assert isinstance(ends(run(host))["c"], Done)
    assert shelf.asked.count("llama") == 2


def test_a_deadline_counts_while_the_model_loads(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    shelf.gates["llama"] = threading.Event()
    host = make_host()
    host.submit(make_request("a", weights=ref("llama"), deadline_at=time.time() - 1))
    failure = ends(run(host))["a"]
    assert isinstance(failure, Failure)
    assert failure.status == 504


def test_a_model_is_loaded_ahead_and_has_a_first_token_figure(
    make_host: Callable[..., ModelHost], shelf: Shelf
) -> None:
    host = make_host()
    for _ in range(2):
        host.tell(Load(served=served("llama")))
        settle(host)
    (state,) = host.status().models
    assert (state.serving_key, state.state, state.percent) == ("llama", "resident", 100.0)
    assert state.first_token_seconds is not None
    assert state.load_seconds is not None
    assert 0 < state.first_token_seconds < state.load_seconds + 60
    assert shelf.asked == ["llama"]


def test_the_progress_of_a_load_is_seen_and_its_failure_too(
    make_host: Callable[..., ModelHost], shelf: Shelf, tiny_llama_dir: Path
) -> None:
    shelf.gates["missing"] = threading.Event()
    host = make_host()
    host.tell(Load(served=served("missing")))
    host.step_all()
    (state,) = host.status().models
    assert (state.state, state.bytes, state.percent) == ("loading", SIZE, 0.0)
    shelf.gates["missing"].set()
    settle(host)
    (state,) = host.status().models
    assert state.state == "failed"
    assert "not in the store" in (state.error or "")
    shelf.folders["missing"] = tiny_llama_dir
    host.tell(Load(served=served("missing")))
    settle(host)
    assert [state.state for state in host.status().models] == ["resident"]


def test_a_pinned_model_never_makes_room(
    make_host: Callable[..., ModelHost],
    make_request: Make,
    shelf: Shelf,
    true_bytes: dict[str, int],
) -> None:
    room = true_bytes["llama"] + true_bytes["gpt2"] + true_bytes["twin"] - 1
    host = make_host(resident_bytes=room)
    host.tell(Keep(models=(served("llama", true_bytes["llama"]),)))
    settle(host)
    assert host.status().models[0].is_pinned
    for name, weights in [("a", "gpt2"), ("b", "twin"), ("c", "gpt2")]:
        host.submit(make_request(name, weights=ref(weights, true_bytes[weights])))
        assert isinstance(ends(run(host))[name], Done)
        assert host.status().resident == ("llama", weights)
    host.submit(make_request("d", weights=ref("big", room)))
    failure = ends(run(host))["d"]
    assert isinstance(failure, Failure)
    assert failure.code == "model_too_large"
    assert "pinned" in failure.message
    host.tell(Keep(models=()))
    host.step_all()
    shelf.folders["big"] = shelf.folders["llama"]
    host.submit(make_request("e", weights=ref("big", room)))
    assert isinstance(ends(run(host))["e"], Done)
    assert host.status().resident == ("big",)


def test_an_unloaded_model_first_finishes_what_it_has(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    host = make_host()
    host.submit(make_request("old", weights=ref("llama"), max_tokens=60, ignore_eos=True))
    found = run(host, until=lambda found: bool(found))
    host.tell(Unload(serving_key="llama"))
    host.submit(make_request("new", weights=ref("llama")))
    found += run(host)
    assert list(ends(found)) == ["old", "new"]
    assert all(isinstance(reply, Done) for reply in ends(found).values())
    assert shelf.asked == ["llama", "llama"]
    host.tell(Unload(serving_key="llama"))
    settle(host)
    assert host.status().models == ()


class PanicException(BaseException):
    """What a panic of a Rust library is in Python."""


class Gated:
    """A tokenizer that takes its time for a text with "slow" in it, and panics for one with "panic"."""

    def __init__(self, tokenizer: Any) -> None:  # Any: transformers is untyped here
        self._tokenizer = tokenizer
        self.gate = threading.Event()
        self.num_begun = 0

    def __call__(self, text: str, **options: Any) -> Any:  # Any: transformers is untyped here
        if "slow" in text:
            self.num_begun += 1
            assert self.gate.wait(10)
        if "panic" in text:
            raise PanicException("called `Option::unwrap()` on a `None` value")
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:  # Any: whatever the tokenizer has
        return getattr(self._tokenizer, name)


@pytest.fixture
def gated(
    make_host: Callable[..., ModelHost], true_bytes: dict[str, int]
) -> Iterator[tuple[ModelHost, Gated]]:
    """A host with room for one model, which is loaded."""
    host = make_host(resident_bytes=true_bytes["llama"] + true_bytes["gpt2"] - 1)
    host.tell(Load(served=served("llama", true_bytes["llama"])))
    settle(host)
    engine: Any = host._model_cache.engine_of("llama")  # Any: reaches into the engine on purpose
    engine.tokenizer = Gated(engine.tokenizer)
    yield host, engine.tokenizer
    engine.tokenizer.gate.set()


def test_streams_and_other_tenants_go_on_while_a_long_prompt_is_tokenised(
    gated: tuple[ModelHost, Gated], make_request: Make
) -> None:
    host, tokenizer = gated
    host.submit(make_request("running", weights=ref("llama"), max_tokens=100, ignore_eos=True))
    run(host, until=bool)
    host.submit(make_request("a1", tenant="a", weights=ref("llama"), text="slow"))
    host.submit(make_request("a2", tenant="a", weights=ref("llama")))
    host.submit(make_request("b", tenant="b", weights=ref("llama")))
    found = run(host, until=lambda found: ends(found).keys() >= {"running", "b"})
    assert list(ends(found)) == ["b", "running"]
    assert host.status().num_waiting == 2
    assert not host.wait_for_work(0.01)
    tokenizer.gate.set()
    assert list(ends(run(host))) == ["a1", "a2"]


def test_a_cancelled_request_is_forgotten_while_its_prompt_is_tokenised(
    gated: tuple[ModelHost, Gated], make_request: Make
) -> None:
    host, tokenizer = gated
    for name in ("begun", "waiting"):
        host.submit(make_request(name, weights=ref("llama"), text="slow"))
    host.step_all()
    for name in ("begun", "waiting"):
        host.abort(name)
    host.step_all()
    assert (host.has_work(), host.status().num_waiting) == (False, 0)
    tokenizer.gate.set()
    host.submit(make_request("next", weights=ref("llama")))
    assert list(ends(run(host))) == ["next"]
    assert tokenizer.num_begun == 1


def test_a_deadline_counts_while_a_prompt_is_tokenised(
    gated: tuple[ModelHost, Gated], make_request: Make
) -> None:
    host, _ = gated
    host.submit(make_request("a", weights=ref("llama"), text="slow", deadline_at=time.time() + 0.2))
    failure = ends(run(host))["a"]
    assert isinstance(failure, Failure)
    assert failure.status == 504


def test_a_panic_of_a_tokenizer_ends_that_request_only(
    gated: tuple[ModelHost, Gated], make_request: Make
) -> None:
    host, _ = gated
    host.submit(make_request("bad", weights=ref("llama"), text="panic"))
    host.submit(make_request("good", weights=ref("llama")))
    found = ends(run(host))
    failure = found["bad"]
    assert isinstance(failure, Failure)
    assert (failure.status, failure.code) == (400, "invalid_value")
    assert isinstance(found["good"], Done)


def test_a_model_stays_while_a_prompt_for_it_is_tokenised(
    gated: tuple[ModelHost, Gated], make_request: Make, shelf: Shelf, true_bytes: dict[str, int]
) -> None:
    host, tokenizer = gated
    host.submit(make_request("a", weights=ref("llama"), text="slow"))
    host.step_all()
    host.submit(make_request("b", weights=ref("gpt2", true_bytes["gpt2"])))
    host.step_all()
    host.tell(Unload(serving_key="llama"))
    host.step_all()
    assert host.status().resident == ("llama",)
    tokenizer.gate.set()
    assert list(ends(run(host))) == ["a", "b"]
    assert shelf.asked == ["llama", "gpt2"]


def test_a_tenant_does_not_wait_for_all_the_models_that_another_asks_for(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    for name in ("first", "second", "third"):
        shelf.folders[name] = shelf.folders["llama"]
        shelf.gates[name] = threading.Event()
    host = make_host()
    for name in ("first", "second", "third"):
        host.submit(make_request(name, tenant="a", weights=ref(name)))
    host.step_all()
    host.submit(make_request("b", tenant="b", weights=ref("gpt2")))
    host.step_all()
    for gate in shelf.gates.values():
        gate.set()
    assert ends(run(host)).keys() == {"first", "second", "third", "b"}
    assert shelf.asked == ["first", "gpt2", "second", "third"]


def test_a_model_served_another_way_is_loaded_beside(
    make_host: Callable[..., ModelHost], make_request: Make
) -> None:
    host = make_host()
    host.submit(make_request("a", weights=ref("llama")))
    host.submit(make_request("b", weights=ref("llama"), serving=ServingOptions(engine="vllm")))
    found = ends(run(host))
    assert isinstance(found["a"], Done)
    failure = found["b"]
    assert isinstance(failure, Failure)
    assert failure.code == "serving_option_unavailable"
    assert host.status().resident == ("llama",)


def test_the_status_has_one_load_per_model(
    make_host: Callable[..., ModelHost], make_request: Make, shelf: Shelf
) -> None:
    host = make_host()
    options = {"max_tokens": 200, "ignore_eos": True}
    plain = ServingOptions(weights="plain")
    shelf.gates["gpt2"] = threading.Event()
    host.submit(make_request("a", model="m", weights=ref("llama"), n=2, **options))
    host.submit(make_request("b", model="m", weights=ref("llama"), serving=plain, **options))
    run(host, lambda found: {reply.id for _, reply in found} == {"a", "b"})
    host.submit(make_request("c", model="other", weights=ref("gpt2"), **options))
    host.step_all()
    loads = {load.model: load for load in host.status().loads}
    assert loads.keys() == {"m", "other"}
    assert (loads["m"].num_running, loads["m"].num_waiting) == (3, 0)
    assert loads["m"].kv_cache_usage > 0
    assert loads["m"].num_prefix_queries > 0
    assert loads["other"] == EngineLoad(model="other", num_waiting=1)
    for name in ("a", "b", "c"):
        host.abort(name)
    shelf.gates["gpt2"].set()
    settle(host)
    assert [load.num_running + load.num_waiting for load in host.status().loads] == [0, 0]


def test_a_kv_cache_counts_and_makes_idle_models_leave(
    make_host: Callable[..., ModelHost], make_request: Make, true_bytes: dict[str, int]
) -> None:
    def bytes_of(host: ModelHost) -> dict[str, int]:
        return {state.serving_key: state.bytes for state in host.status().models}

    def begin(host: ModelHost, **options: Any) -> None:  # Any: fields of a request
        host.submit(make_request("a", weights=ref("llama"), max_tokens=200, **options))
        run(host, until=lambda found: bool(found))

    measured = make_host()
    begin(measured)
    (with_cache,) = bytes_of(measured).values()
    assert with_cache > true_bytes["llama"]
    host = make_host(resident_bytes=with_cache + true_bytes["gpt2"] - 1)
    host.submit(make_request("b", weights=ref("gpt2", 1)))
    run(host)
    assert len(bytes_of(host)) == 1
    begin(host)
    host.step_all()
    assert list(bytes_of(host)) == ["llama"]
