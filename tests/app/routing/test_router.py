"""The request router over a real Valkey; the tests speak for the workers."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from app.contracts.control import Cancel, ServeWorkerStatus, Unload
from app.contracts.generation import (
    Delta,
    Done,
    Failure,
    GenerateRequest,
    Reply,
    ReplyBatch,
    ServingOptions,
)
from app.contracts.messages import ArtifactRef, control_channel, reply_channel, serve_worker_key
from app.errors import BadRequest, StillhouseError, Unavailable
from app.routing import router
from app.routing.reply_stream import ReplyStream
from app.routing.router import RequestRouter
from app.routing.task_queue import queue_key
from app.settings import Settings

WEIGHTS = ArtifactRef(key="models/x", bytes=1)


class Stage:
    """A request router, and the voice of the workers."""

    def __init__(self, request_router: RequestRouter, client: "Redis", control: PubSub) -> None:
        self.request_router, self.redis, self.control = request_router, client, control
        self.num_ended = 0

    async def beat(self, worker_id: str, **changes: Any) -> None:  # Any: fields of the heartbeat
        fields: dict[str, Any] = {
            "worker_id": worker_id,
            "max_running": 8,
            "beat_at": time.time(),
        } | changes
        await self.redis.set(
            serve_worker_key(worker_id), ServeWorkerStatus(**fields).model_dump_json()
        )
        await asyncio.sleep(0.12)  # two looks

    async def die(self, worker_id: str) -> None:
        await self.redis.delete(serve_worker_key(worker_id))

    async def open(
        self,
        name: str = "r",
        num_prompts: int = 1,
        n: int = 1,
        seconds: float = 60,
        serving: ServingOptions | None = None,
    ) -> ReplyStream:
        """A flow of prompts with the ids r0, r1, …"""
        common: dict[str, Any] = {
            "reply_to": "",
            "model": "m",
            "weights": WEIGHTS,
            "text": "x",
            "n": n,
        }
        common["serving"] = serving or ServingOptions()
        deadline = time.time() + seconds
        requests = [
            GenerateRequest(id=f"{name}{number}", deadline_at=deadline, **common)
            for number in range(num_prompts)
        ]
        return await self.request_router.open(requests, self.count_end)

    def count_end(self, _: object) -> None:
        self.num_ended += 1

    async def say(self, *replies: Reply) -> None:
        message = ReplyBatch(replies=replies).model_dump_json()
        await self.redis.publish(reply_channel(self.request_router.api_id), message)

    async def num_queued(self, worker_id: str) -> int:
        return int(await self.redis.llen(queue_key(worker_id)))

    async def until_queued(self, worker_id: str, count: int = 1) -> None:
        async with asyncio.timeout(5):
            while await self.num_queued(worker_id) < count:
                await asyncio.sleep(0.02)

    async def cancelled(self) -> str:
        """Wire id of the next cancellation any worker is told."""
        async with asyncio.timeout(5):
            while True:
                message = await self.control.get_message(ignore_subscribe_messages=True, timeout=1)
                if message is not None:
                    return Cancel.model_validate_json(message["data"]).id


@asynccontextmanager
async def staged(settings: Settings) -> AsyncIterator[Stage]:
    request_router = RequestRouter(settings)
    async with Redis.from_url(settings.redis_url) as client, client.pubsub() as control:
        await control.psubscribe(control_channel("*"))
        await request_router.start()
        try:
            yield Stage(request_router, client, control)
        finally:
            await request_router.stop()
    started, ended, in_progress = itertools.islice(request_router.metrics.collect(), 3)
    num_started = sum(sample.value for sample in started.samples)
    assert num_started == sum(sample.value for sample in ended.samples)
    assert [sample for sample in in_progress.samples if sample.value] == []


Scene = Callable[[Stage], Coroutine[object, object, None]]
Play = Callable[[Scene], None]


@pytest.fixture
def play(valkey: str, settings_env: Callable[..., Settings]) -> Play:
    settings = settings_env(serve_heartbeat_seconds=0.05)

    def run(scene: Scene) -> None:
        async def whole() -> None:
            async with asyncio.timeout(30), staged(settings) as stage:
                await scene(stage)

        asyncio.run(whole())

    return run


def delta(wire_id: str, text: str, choice: int = 0) -> Delta:
    return Delta(id=wire_id, choice=choice, text=text)


def done(wire_id: str) -> Done:
    return Done(id=wire_id, prompt_tokens=1, completion_tokens=2)


async def failure_of(reply_stream: ReplyStream) -> StillhouseError:
    try:
        while await reply_stream.take():
            pass
    except StillhouseError as error:
        return error
    raise AssertionError("the flow ended well")


def test_replies_come_in_order_with_the_number_of_their_prompt(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        reply_stream = await stage.open(num_prompts=2)
        await stage.say(delta("r1.1", "x"), delta("r0.1", "y"), done("r1.1"))
        await stage.say(delta("r0.1", "z"), done("r0.1"))
        heard = []
        while news := await reply_stream.take():
            heard += [(prompt, reply.text) for prompt, reply in news if isinstance(reply, Delta)]
        assert heard == [(1, "x"), (0, "y"), (0, "z")]
        assert stage.num_ended == 1

    play(scene)


def test_the_worker_with_the_model_is_preferred_until_it_is_full(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("has", resident=("models/x",), num_running=5)
        await stage.beat("idle")
        await stage.beat("leaving", resident=("models/x",), is_draining=True)
        await stage.open(n=3)
        assert await stage.num_queued("has") == 1
        await stage.beat("has", resident=("models/x",), num_running=8)
        await stage.open()
        assert await stage.num_queued("idle") == 1
        assert await stage.num_queued("leaving") == 0

    play(scene)


def test_a_worker_that_computes_nothing_is_asked_last(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("stuck", resident=("models/x",), stalled_seconds=60.0)
        await stage.beat("well", num_running=5)
        await stage.open()
        assert (await stage.num_queued("stuck"), await stage.num_queued("well")) == (0, 1)

    play(scene)


def test_what_is_said_to_all_workers_is_heard_or_refused(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        with pytest.raises(Unavailable, match="no serve worker is running"):
            await stage.request_router.tell(Unload(serving_key="models/x"))
        await stage.beat("a")
        await stage.beat("drains", is_draining=True)
        assert await stage.request_router.tell(Unload(serving_key="models/x")) == ["a"]
        with pytest.raises(Unavailable, match="with vLLM"):
            await stage.request_router.tell(Unload(serving_key="models/x"), engine="vllm")

    play(scene)


def test_a_model_of_vllm_goes_only_to_a_worker_that_has_vllm(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        served = ServingOptions(engine="vllm")
        await stage.beat("plain")
        with pytest.raises(Unavailable, match="no serve worker with vLLM is running"):
            await stage.open(serving=served)
        await stage.beat("both", engines=("transformers", "vllm"), num_running=3)
        await stage.open(serving=served)
        assert (await stage.num_queued("plain"), await stage.num_queued("both")) == (0, 1)

    play(scene)


def test_without_a_worker_nothing_is_opened_and_the_room_is_given_back(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        with pytest.raises(Unavailable) as refused:
            await stage.open()
        assert refused.value.code == "no_worker"
        assert stage.num_ended == 1

    play(scene)


def test_closing_a_flow_cancels_its_prompts_and_later_replies_are_dropped(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        reply_stream = await stage.open(num_prompts=2)
        await stage.say(done("r0.1"))
        assert len(await reply_stream.take()) == 1
        reply_stream.close()
        assert await stage.cancelled() == "r1.1"
        await stage.say(delta("r1.1", "late"))
        await asyncio.sleep(0.1)
        assert await reply_stream.take() == []
        assert stage.num_ended == 1

    play(scene)


def test_a_failure_ends_the_flow_and_cancels_the_other_prompts(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        reply_stream = await stage.open(num_prompts=2)
        await stage.say(Failure(id="r0.1", status=400, code="c", message="m", param="prompt"))
        error = await failure_of(reply_stream)
        assert isinstance(error, BadRequest)
        assert (error.code, error.param) == ("c", "prompt")
        assert await stage.cancelled() == "r1.1"

    play(scene)


def test_a_dead_workers_unheard_request_moves_and_its_begun_one_fails(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        unheard, begun = await stage.open("u"), await stage.open("b")
        await stage.say(delta("b0.1", "once"))
        assert len(await begun.take()) == 1
        await stage.beat("other")
        await stage.die("a")
        assert (await failure_of(begun)).code == "worker_lost"
        await stage.until_queued("other")
        assert await stage.num_queued("a") == 0, "the dead worker's queue stays behind"
        await stage.say(delta("u0.1", "from the grave"), delta("u0.2", "alive"))
        assert [reply.text for _, reply in await unheard.take() if isinstance(reply, Delta)] == [
            "alive"
        ]

    play(scene)


def test_a_request_that_has_outlived_three_workers_is_given_up(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("w0")
        reply_stream = await stage.open()
        for number in range(3):
            await stage.until_queued(f"w{number}")
            await stage.beat(f"w{number + 1}")
            await stage.die(f"w{number}")
        assert (await failure_of(reply_stream)).code == "worker_lost"
        assert await stage.num_queued("w3") == 0

    play(scene)


def test_a_cut_reply_channel_fails_begun_answers_and_repeats_the_others(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        unheard, begun = await stage.open("u"), await stage.open("b")
        await stage.say(delta("b0.1", "once"))
        assert len(await begun.take()) == 1
        await stage.control.aclose()
        await stage.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        assert (await failure_of(begun)).code == "worker_lost"
        await stage.until_queued("a", 3)
        await stage.say(delta("u0.2", "again"))
        assert len(await unheard.take()) == 1

    play(scene)


def test_a_blocked_event_loop_is_not_taken_for_a_lost_reply_channel(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("a", num_running=1)
        reply_stream = await stage.open()
        await stage.say(delta("r0.1", "x"))
        assert await reply_stream.take()
        time.sleep(6.5)  # longer than the silence after which the channel is lost
        await asyncio.sleep(0.5)
        await stage.say(delta("r0.1", "y"), done("r0.1"))
        assert [
            reply.text for _, reply in await reply_stream.take() if isinstance(reply, Delta)
        ] == ["y"]

    play(scene)


@pytest.mark.parametrize("broken", ["pubsub", "scan_iter"])
@pytest.mark.parametrize("error", [RuntimeError("the handler is closed"), KeyError("who knows")])
def test_listening_and_watching_outlive_any_error(
    play: Play, monkeypatch: pytest.MonkeyPatch, broken: str, error: Exception
) -> None:
    """uvloop raises a RuntimeError for a write on a connection that was closed just then; it ended the loop for good."""

    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        with monkeypatch.context() as patched:

            def fail(*_: object, **__: object) -> None:
                raise error

            patched.setattr(stage.request_router._redis, broken, fail)
            await stage.control.aclose()
            # it has to listen anew
            await stage.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await asyncio.sleep(0.4)
        await asyncio.sleep(0.6)
        await stage.die("a")
        await stage.beat("b")
        await asyncio.sleep(0.3)
        assert [worker.worker_id for worker in stage.request_router.workers] == ["b"]
        reply_stream = await stage.open()
        await stage.say(delta("r0.1", "heard"))
        assert len(await reply_stream.take()) == 1

    play(scene)


def test_a_draining_worker_hands_its_request_on(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        reply_stream = await stage.open()
        await stage.beat("b")
        await stage.beat("a", is_draining=True)
        await stage.say(Failure(id="r0.1", status=503, code="draining", message="shutting down"))
        await stage.until_queued("b")
        await stage.say(done("r0.2"))
        assert len(await reply_stream.take()) == 1

    play(scene)


def test_a_request_that_an_idle_worker_never_got_is_sent_again(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "LOST_SECONDS", 0.4)

    async def scene(stage: Stage) -> None:
        await stage.beat("a", num_running=1)
        await stage.open()
        await asyncio.sleep(0.6)
        assert await stage.num_queued("a") == 1, "a busy worker may take its time"
        await stage.beat("a")
        await stage.until_queued("a", 2)

    play(scene)


def test_a_request_that_a_busy_worker_does_not_have_is_sent_again_and_a_begun_one_fails(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "FORGOTTEN_SECONDS", 0.4)

    async def scene(stage: Stage) -> None:
        await stage.beat("a", num_running=1, requests=["q0.1", "r0.1"])
        unread, begun = await stage.open("q"), await stage.open("r")
        await stage.say(delta("r0.1", "so"))
        await asyncio.sleep(0.6)
        assert await stage.num_queued("a") == 2, "the worker says that it has them"
        await stage.beat("a", num_running=1)
        await asyncio.sleep(0.6)
        assert await stage.num_queued("a") == 2, "a worker of before does not say"
        await stage.beat("a", num_running=1, requests=[])
        await stage.until_queued("a", 3)
        await stage.say(delta("q0.1", "late"), done("q0.2"))
        assert [type(reply) for _, reply in await unread.take()] == [Done]
        assert (await failure_of(begun)).code == "worker_lost"

    play(scene)


def test_replies_that_come_twice_are_heard_once(play: Play) -> None:
    """A publish whose answer was lost is tried again, though it may have been heard."""

    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        reply_stream = await stage.open()
        message = ReplyBatch(replies=(delta("r0.1", "one"),)).model_dump_json()
        for _ in range(2):
            await stage.redis.publish(reply_channel(stage.request_router.api_id), message)
        await stage.say(delta("r0.1", "two"), done("r0.1"))
        texts = []
        while replies := await reply_stream.take():
            texts += [reply.text for _, reply in replies if isinstance(reply, Delta)]
        assert texts == ["one", "two"]

    play(scene)


def test_a_request_that_its_worker_does_not_end_in_time_is_ended_here(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "DEADLINE_SLACK_SECONDS", 0.1)

    async def scene(stage: Stage) -> None:
        await stage.beat("a", num_running=1)
        reply_stream = await stage.open(seconds=0.2)
        error = await failure_of(reply_stream)
        assert (error.status, error.code) == (504, "request_timeout")
        assert await stage.cancelled() == "r0.1"

    play(scene)


def test_a_client_that_does_not_read_is_dropped_before_its_backlog_grows(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        reply_stream = await stage.open()
        for _ in range(170):
            await stage.say(*(delta("r0.1", "x") for _ in range(100)))
        assert await stage.cancelled() == "r0.1"
        assert (await failure_of(reply_stream)).code == "slow_client"

    play(scene)


def test_a_stopping_server_fails_and_cancels_what_it_has(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        await stage.beat("a")
        reply_stream = await stage.open()
        await stage.request_router.stop()
        assert (await failure_of(reply_stream)).code == "draining"
        assert await stage.cancelled() == "r0.1"

    play(scene)


def test_without_redis_a_request_is_refused_soon(settings_env: Callable[..., Settings]) -> None:
    async def ask() -> None:
        request_router = RequestRouter(settings_env(redis_url=""))
        await request_router.start()
        request = GenerateRequest(
            id="r", reply_to="", model="m", weights=WEIGHTS, text="x", deadline_at=time.time() + 60
        )
        began = time.monotonic()
        with pytest.raises(Unavailable) as refused:
            await request_router.open([request], lambda _: None)
        assert refused.value.code == "no_worker"
        assert time.monotonic() - began < 30
        await request_router.stop()

    asyncio.run(ask())
