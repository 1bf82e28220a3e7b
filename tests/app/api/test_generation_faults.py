"""Generation when workers die, clients leave, and there is more to do than room: over real HTTP and processes."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from app.settings import Settings
from bench.callers import drop_streams
from bench.load import Target
from tests.serve_worker import WorkerProcess
from tests.waiting import wait_for

PROMPT = "What does a lantern mean?"
LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": PROMPT,
    "max_tokens": 240,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def start_worker(
    valkey: str, settings_env: Callable[..., Settings], tmp_path: Path
) -> Iterator[Callable[[], WorkerProcess]]:
    settings_env(serve_heartbeat_seconds=0.2, num_threads=1, max_running_sequences=8)
    started: list[WorkerProcess] = []

    def start() -> WorkerProcess:
        started.append(WorkerProcess(valkey, tmp_path / f"worker-{len(started)}.log"))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


@pytest.fixture
def worker(
    start_worker: Callable[[], WorkerProcess], register: Callable[..., str]
) -> WorkerProcess:
    """A worker, and the tiny model under the name `tiny`."""
    register()
    return start_worker()


@pytest.fixture
def one_request_a_key(settings_env: Callable[..., Settings]) -> None:
    settings_env(max_requests_per_key=1)


@pytest.fixture
def little_room(settings_env: Callable[..., Settings]) -> None:
    settings_env(max_waiting_tokens=300)


@pytest.fixture
def one_request_in_all(settings_env: Callable[..., Settings]) -> None:
    settings_env(max_waiting_requests=1)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_stops_its_generation(
    worker: WorkerProcess, service: Any, client: openai.OpenAI, is_streamed: bool
) -> None:
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)  # loads the model
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 240,
        "n": 128,
        "ignore_eos": True,
        "stream": is_streamed,
    }

    async def leave_early() -> None:
        headers = {"authorization": f"Bearer {service.new_key()}"}
        async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=30) as http:
            asking = asyncio.create_task(read_all(http, body))
            while not worker.status().num_running:
                await asyncio.sleep(0.02)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    began = time.monotonic()
    asyncio.run(leave_early())
    # 128 choices on 8 rows are some 4,000 steps; what is checked is that they were not all taken
    wait_for(worker.is_idle, 2, "it went on")
    stopped_after = time.monotonic() - began
    began = time.monotonic()
    client.completions.create(**LONG)
    assert stopped_after < 16 * (time.monotonic() - began), "as slow as if nobody had left"


def test_streams_that_their_clients_left_are_not_written_on(
    worker: WorkerProcess, service: Any, client: openai.OpenAI, valkey: str
) -> None:
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)  # loads the model
    target = Target(service.url, "tiny", service.new_key())
    drops = asyncio.run(drop_streams(target, valkey, num_drops=12, num_callers=4))
    assert len(drops) == 12
    # One step may be under way; a step of a tiny model is shorter than a switch of threads. Each would have 200.
    assert [drop for drop in drops if drop.told_at is None or drop.num_after_telling > 4] == []
    wait_for(worker.is_idle, 5, "it went on")


async def read_all(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_bytes():
            pass


def test_without_a_worker_generation_is_refused_with_a_time_to_retry(
    http: httpx.Client, register: Callable[..., str]
) -> None:
    register()
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_worker"
    assert 1 <= int(response.headers["retry-after"]) <= 120


def test_a_key_over_its_share_is_told_to_wait_while_others_are_served(
    one_request_a_key: None, worker: WorkerProcess, service: Any
) -> None:
    with service.client() as busy, service.client() as other:
        stream = busy.completions.create(**LONG, n=64, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            busy.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)
        assert refused.value.code == "rate_limit_exceeded"
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 120
        other.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)
        stream.close()
        wait_for(worker.is_idle, 5, "it went on")
        busy.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)


def test_a_full_server_refuses_a_newcomer_only_beyond_its_share(
    little_room: None, worker: WorkerProcess, service: Any
) -> None:
    with service.client() as one, service.client() as other:
        stream = one.completions.create(**LONG, stream=True)
        next(iter(stream))
        with pytest.raises(
            openai.RateLimitError, match="limit with 2 active keys is 128 and 150"
        ) as refused:
            other.completions.create(**LONG)
        assert (refused.value.status_code, refused.value.code) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 120
        with pytest.raises(openai.BadRequestError) as hopeless:
            other.completions.create(**LONG, n=2)
        assert hopeless.value.code == "request_too_large"
        other.completions.create(model="tiny", prompt=PROMPT, max_tokens=100)
        stream.close()


def test_a_full_server_turns_a_key_away_before_it_is_verified(
    one_request_in_all: None, worker: WorkerProcess, client: openai.OpenAI, service: Any
) -> None:
    body = {"model": "tiny", "prompt": PROMPT}
    with (
        service.http(client.api_key[:-3] + "xyz") as forger,
        service.http("no key of ours") as stranger,
    ):
        stream = client.completions.create(**LONG, stream=True)
        next(iter(stream))
        refused = forger.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_overloaded")
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert stranger.post("/v1/completions", json=body).status_code == 401
        stream.close()
        wait_for(
            lambda: forger.post("/v1/completions", json=body).status_code == 401, 5, "still full"
        )


def test_a_killed_worker_ends_a_begun_answer_with_an_error_chunk(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    stream = client.completions.create(**LONG, n=64, stream=True)
    next(iter(stream))
    worker.stop(signal.SIGKILL)
    with pytest.raises(openai.APIError) as lost:
        list(stream)
    assert lost.value.code == "worker_lost"


def test_a_request_that_a_dying_worker_has_not_begun_goes_to_another(
    start_worker: Callable[[], WorkerProcess], register: Callable[..., str], client: openai.OpenAI
) -> None:
    register()
    workers = [start_worker(), start_worker()]
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    wait_for(
        lambda: any(worker.status().resident for worker in workers),
        5,
        "no heartbeat shows the model",
    )
    time.sleep(0.5)  # the API looks at heartbeats every 0.2 s
    (holder,) = [worker for worker in workers if worker.status().resident]
    (other,) = [worker for worker in workers if worker is not holder]
    holder.process.send_signal(signal.SIGSTOP)
    assert client.completions.create(**asked).choices[0].text == text
    wait_for(lambda: other.status().resident, 5, "the other worker never loaded the model")
    holder.process.send_signal(signal.SIGCONT)


def test_a_drained_worker_finishes_its_answers_and_ends_well(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    whole = client.completions.create(**LONG, temperature=0).choices[0].text
    stream = client.completions.create(**LONG, temperature=0, stream=True)
    text = next(iter(stream)).choices[0].text
    worker.process.send_signal(signal.SIGTERM)
    assert text + "".join(chunk.choices[0].text for chunk in stream) == whole
    assert worker.process.wait(20) == 0
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model="tiny", prompt=PROMPT)
    assert refused.value.code == "no_worker"


def test_generation_goes_on_after_all_connections_to_valkey_were_cut(
    worker: WorkerProcess, service: Any, valkey: str
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    with service.client(max_retries=4) as client, redis.Redis.from_url(valkey) as operator:
        text = client.completions.create(**asked).choices[0].text
        for kind in ("normal", "pubsub"):
            operator.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        assert client.completions.create(**asked).choices[0].text == text
