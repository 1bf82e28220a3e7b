"""The serve worker's threads around a real engine, over a real Valkey; the tests speak for the API."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from app.contracts.control import Cancel, Keep, ServedModel, ServeWorkerStatus
from app.contracts.generation import (
    Delta,
    Done,
    Failure,
    GenerateRequest,
    Reply,
    ReplyBatch,
    Sampling,
    ServingOptions,
)
from app.contracts.messages import ArtifactRef, control_channel, reply_channel, serve_worker_key
from tests.waiting import wait_for
from worker.serve.host.model_host import ModelHost
from worker.serve_worker import ServeOptions, ServeWorker

WEIGHTS = ArtifactRef(key="models/tiny", bytes=700_000)
HOME = "api1"


class Ear:
    """An API process that listens on its reply channel."""

    def __init__(self, url: str, home: str = HOME) -> None:
        self.redis = redis.Redis.from_url(url)
        self.pubsub = self.redis.pubsub(ignore_subscribe_messages=True)
        self.pubsub.subscribe(reply_channel(home))
        self.replies: list[Reply] = []
        self.num_batches = 0

    def listen(self, until: Callable[[], bool], seconds: float = 80) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"heard only {self.replies[-3:]}"
            self.take()

    def take(self) -> bool:
        """Whether there was a message."""
        message = self.pubsub.get_message(timeout=0.05)
        if message is not None:
            self.replies += ReplyBatch.model_validate_json(message["data"]).replies
            self.num_batches += 1
        return message is not None

    def ended(self) -> set[str]:
        return {reply.id for reply in self.replies if not isinstance(reply, Delta)}

    def text(self, request_id: str) -> str:
        return "".join(r.text for r in self.replies if isinstance(r, Delta) and r.id == request_id)

    def close(self) -> None:
        self.pubsub.close()
        self.redis.close()


class Bench:
    """A worker under test."""

    def __init__(self, url: str, folder: Path, **changes: float) -> None:
        torch.set_num_threads(1)
        self.host = ModelHost(
            resident_bytes=2**30, loader=lambda ref: folder, max_running=4, max_context_tokens=256
        )
        self.ends: list[bool] = []
        self.has_ended = threading.Event()
        options = ServeOptions(
            worker_id="w1",
            redis_url=url,
            max_running=4,
            heartbeat_seconds=0.1,
            drain_seconds=changes.get("drain_seconds", 30.0),
        )
        self.worker = ServeWorker(self.host, options, self.end)
        self.worker.start()

    def end(self, is_as_asked: bool) -> None:
        self.ends.append(is_as_asked)
        self.has_ended.set()

    def close(self) -> None:
        self.worker.drain()
        for request_id in list(self.worker._reply_channels):
            self.worker.cancel(request_id)
        assert self.has_ended.wait(20)
        self.host.close()


@pytest.fixture
def bench(valkey: str, tiny_llama_dir: Path) -> Iterator[Bench]:
    made = Bench(valkey, tiny_llama_dir)
    yield made
    made.close()


@pytest.fixture
def subscription(valkey: str) -> Iterator[Ear]:
    made = Ear(valkey)
    yield made
    made.close()


def request(
    request_id: str, *, home: str = HOME, max_tokens: int = 8, n: int = 1, text: str = "lamp"
) -> GenerateRequest:
    return GenerateRequest(
        id=request_id,
        reply_to=home,
        model="tiny",
        weights=WEIGHTS,
        text=text,
        n=n,
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        deadline_at=time.time() + 60,
    )


def test_each_step_is_one_publish_with_everything_for_that_api_process(
    bench: Bench, subscription: Ear
) -> None:
    for name in ("a", "b", "c"):
        bench.worker.submit(request(name, max_tokens=40))
    subscription.listen(lambda: subscription.ended() == {"a", "b", "c"})
    assert subscription.text("a") == subscription.text("b") == subscription.text("c") != ""
    assert subscription.num_batches < len(subscription.replies) / 2


def test_replies_go_to_the_process_that_asked(bench: Bench, subscription: Ear, valkey: str) -> None:
    other = Ear(valkey, "api2")
    bench.worker.submit(request("mine"))
    bench.worker.submit(request("theirs", home="api2"))
    subscription.listen(lambda: "mine" in subscription.ended())
    other.listen(lambda: "theirs" in other.ended())
    assert {reply.id for reply in subscription.replies} == {"mine"}
    assert {reply.id for reply in other.replies} == {"theirs"}
    other.close()


def test_a_cancel_on_the_control_channel_stops_within_a_step(
    bench: Bench, subscription: Ear
) -> None:
    bench.worker.submit(request("gone", max_tokens=240, n=64))
    bench.worker.submit(request("stays", max_tokens=100))
    subscription.listen(lambda: bool(subscription.text("gone")))
    wait_for(
        lambda: subscription.redis.publish(
            control_channel("w1"), Cancel(id="gone").model_dump_json()
        ),
        5,
        "nobody hears",
    )
    wait_for(lambda: "gone" not in bench.worker._reply_channels, 2, "the cancel was not obeyed")
    # 60 choices of `gone` were before it in the queue: it can only end now because they are no more
    subscription.listen(lambda: "stays" in subscription.ended())
    assert "gone" not in subscription.ended()
    assert len([reply for reply in subscription.replies if reply.id == "gone"]) < 64 * 240 / 4
    first = next(number for number, reply in enumerate(subscription.replies) if reply.id == "stays")
    assert all(reply.id == "stays" for reply in subscription.replies[first:])


def test_a_cancel_that_overtakes_its_request_still_counts(bench: Bench, subscription: Ear) -> None:
    bench.worker.cancel("early")
    bench.worker.submit(request("early"))
    bench.worker.submit(request("next"))
    subscription.listen(lambda: "next" in subscription.ended())
    assert {reply.id for reply in subscription.replies} == {"next"}


def test_a_request_delivered_twice_is_answered_once(bench: Bench, subscription: Ear) -> None:
    bench.worker.submit(request("twice", max_tokens=30))
    bench.worker.submit(request("twice", max_tokens=30))
    bench.worker.submit(request("last", max_tokens=60))
    subscription.listen(lambda: "last" in subscription.ended())
    assert (
        len(
            [
                reply
                for reply in subscription.replies
                if isinstance(reply, Done) and reply.id == "twice"
            ]
        )
        == 1
    )


def test_nothing_is_written_for_an_api_process_that_is_gone(
    bench: Bench, subscription: Ear
) -> None:
    bench.worker.submit(request("orphan", home="dead", max_tokens=240, n=64))
    bench.worker.submit(request("mine"))
    subscription.listen(lambda: "mine" in subscription.ended())
    wait_for(lambda: not bench.worker._reply_channels, 2, "it writes on for nobody")
    wait_for(lambda: not bench.host.has_work(), 2, "the engine goes on")


def test_a_failure_reaches_the_client_and_the_worker_goes_on(
    bench: Bench, subscription: Ear
) -> None:
    bench.worker.submit(request("long", text="lamp " * 400))
    bench.worker.submit(request("good"))
    subscription.listen(lambda: subscription.ended() == {"long", "good"})
    (failure,) = [reply for reply in subscription.replies if isinstance(reply, Failure)]
    assert (failure.id, failure.status, failure.code) == ("long", 400, "context_length_exceeded")


def test_the_heartbeat_tells_what_is_loaded_and_goes_away_at_the_end(
    bench: Bench, subscription: Ear
) -> None:
    def status() -> ServeWorkerStatus | None:
        value = subscription.redis.get(serve_worker_key("w1"))
        return ServeWorkerStatus.model_validate_json(value) if isinstance(value, bytes) else None

    wait_for(status, 5, "no heartbeat")
    bench.worker.submit(request("a"))
    subscription.listen(lambda: "a" in subscription.ended())
    wait_for(
        lambda: (now := status()) and now.resident == ("models/tiny",), 2, "the model is not shown"
    )
    bench.worker.submit(request("b", max_tokens=240, n=64))
    wait_for(
        lambda: (now := status()) and now.requests == frozenset({"b"}),
        2,
        "the request is not shown",
    )
    bench.worker.cancel("b")
    wait_for(lambda: (now := status()) and now.requests == frozenset(), 2, "it is shown for ever")
    lifetime = subscription.redis.pttl(serve_worker_key("w1"))
    assert isinstance(lifetime, int)
    assert 0 < lifetime <= 2000
    bench.worker.drain()
    wait_for(lambda: status() is None, 3, "the heartbeat outlives the worker")
    assert bench.ends == [True]


def test_a_draining_worker_refuses_newcomers_and_finishes_what_it_has(
    bench: Bench, subscription: Ear
) -> None:
    bench.worker.submit(request("old", max_tokens=200))
    subscription.listen(lambda: bool(subscription.text("old")))
    bench.worker.drain()
    bench.worker.submit(request("new"))
    subscription.listen(lambda: subscription.ended() == {"old", "new"})
    by_id = {reply.id: reply for reply in subscription.replies}
    assert isinstance(by_id["old"], Done)
    assert isinstance(by_id["new"], Failure)
    assert by_id["new"].code == "draining"
    assert bench.has_ended.wait(5)


def test_a_draining_worker_waits_for_a_prompt_that_is_being_tokenised(
    bench: Bench, subscription: Ear
) -> None:
    bench.worker.submit(request("first"))
    subscription.listen(lambda: "first" in subscription.ended())
    # Any: reaches into the engine on purpose
    engine: Any = bench.host._model_cache.engine_of(WEIGHTS.key)
    gate, has_begun, tokenizer = threading.Event(), threading.Event(), engine.tokenizer

    class Slow:
        def __call__(self, text: str, **options: Any) -> Any:  # Any: transformers is untyped here
            has_begun.set()
            assert gate.wait(10)
            return tokenizer(text, **options)

        def __getattr__(self, name: str) -> Any:  # Any: whatever the tokenizer has
            return getattr(tokenizer, name)

    engine.tokenizer = Slow()
    bench.worker.submit(request("slow"))
    assert has_begun.wait(5)
    bench.worker.drain()
    assert not bench.has_ended.wait(0.3)
    gate.set()
    subscription.listen(lambda: "slow" in subscription.ended())
    assert bench.has_ended.wait(5)
    assert isinstance(subscription.replies[-1], Done)
    assert bench.ends == [True]


def test_a_drain_that_takes_too_long_fails_what_is_left(
    valkey: str, tiny_llama_dir: Path, subscription: Ear
) -> None:
    bench = Bench(valkey, tiny_llama_dir, drain_seconds=0.2)
    bench.worker.submit(request("endless", max_tokens=240, n=128))
    subscription.listen(lambda: bool(subscription.text("endless")))
    bench.worker.drain()
    subscription.listen(lambda: "endless" in subscription.ended())
    (failure,) = [reply for reply in subscription.replies if isinstance(reply, Failure)]
    assert failure.code == "draining"
    assert bench.has_ended.wait(5)
    assert bench.ends == [True]
    bench.close()


def test_an_api_process_that_goes_away_in_the_middle_frees_its_rows(
    bench: Bench, subscription: Ear
) -> None:
    bench.worker.submit(request("a", max_tokens=240, n=64))
    subscription.listen(lambda: bool(subscription.text("a")))
    subscription.pubsub.unsubscribe(reply_channel(HOME))
    wait_for(lambda: not bench.worker._reply_channels, 5, "it writes on for nobody")
    wait_for(lambda: not bench.host.has_work(), 2, "the engine goes on")


def test_a_worker_keeps_only_pinned_models_whose_engine_it_has(
    bench: Bench, subscription: Ear
) -> None:
    served = ServedModel(model="tiny", weights=WEIGHTS)
    other = ServedModel(model="other", weights=WEIGHTS, serving=ServingOptions(engine="vllm"))
    pins = Keep(models=(other, served)).model_dump_json()

    def is_loaded() -> bool:
        # again and again: the last test's worker may still listen
        subscription.redis.publish(control_channel("w1"), pins)
        return bool(bench.worker.status().resident)

    wait_for(is_loaded, 20, "nothing was loaded")
    assert [model.serving_key for model in bench.worker.status().models] == [served.serving_key]
