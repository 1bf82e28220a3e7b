"""Generation over real HTTP, with a real serve worker process behind a real Valkey."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from app.contracts import ServeWorkerStatus, serve_worker_key
from app.settings import Settings

PROMPT = "What does a lantern mean?"
START_SECONDS = 60
ROOT = Path(__file__).resolve().parents[3]


class WorkerProcess:
    """`python -m worker.main serve` and what its heartbeat says."""

    def __init__(self, valkey_url: str, log_path: Path) -> None:
        self._redis = redis.Redis.from_url(valkey_url)
        before = self.ids()
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker.main", "serve"], cwd=ROOT, stdout=log, stderr=log
            )
        wait_for(lambda: self.ids() - before, START_SECONDS, f"no heartbeat; its log is {log_path}")
        (self.id,) = self.ids() - before

    def ids(self) -> set[str]:
        return {
            ServeWorkerStatus.model_validate_json(value).worker_id
            for key in self._redis.scan_iter(match=serve_worker_key("*"))
            if (value := self._redis.get(key)) is not None
        }

    def status(self) -> ServeWorkerStatus:
        value = self._redis.get(serve_worker_key(self.id))
        assert isinstance(value, bytes), "the worker has no heartbeat"
        return ServeWorkerStatus.model_validate_json(value)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._redis.close()


def wait_for(is_so: Callable[[], object], seconds: float, why: str) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, why
        time.sleep(0.02)


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
def worker(start_worker: Callable[[], WorkerProcess], register: Callable[..., str]) -> WorkerProcess:
    """A worker, and the tiny model under the name `tiny`."""
    register()
    return start_worker()


@pytest.fixture
def one_request_a_key(settings_env: Callable[..., Settings]) -> None:
    settings_env(max_requests_per_key=1)


@pytest.fixture
def little_room(settings_env: Callable[..., Settings]) -> None:
    settings_env(max_waiting_tokens=300)


LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 240, "extra_body": {"ignore_eos": True}}


def streamed_text(stream: Any) -> str:  # Any: the client's generics say less than the name
    return "".join(chunk.choices[0].text for chunk in stream)


def test_a_streamed_completion_equals_the_whole_one(worker: WorkerProcess, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) > 10, "it came in one piece"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_streamed_chat_equals_the_whole_one_and_ends_with_its_usage(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 48, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage == whole.usage


def test_a_chat_without_max_tokens_takes_what_the_context_leaves(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model="tiny", messages=messages, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256


def test_choices_with_a_seed_are_reproducible_and_differ(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": [PROMPT, "The still"],
        "n": 3,
        "seed": 7,
        "max_tokens": 12,
    }
    first, again = (client.completions.create(**asked) for _ in range(2))
    assert [choice.index for choice in first.choices] == list(range(6))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in first.choices}) == 6
    alone = client.completions.create(**asked | {"n": 1, "prompt": "The still"})
    assert alone.choices[0].text == first.choices[3].text


def test_token_prompts_are_taken_as_they_are(worker: WorkerProcess, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    one = client.completions.create(**asked, prompt=[40, 41, 42])
    two = client.completions.create(**asked, prompt=[[40, 41, 42], [50, 51]])
    assert one.usage is not None
    assert one.usage.prompt_tokens == 3
    assert two.choices[0].text == one.choices[0].text
    assert two.usage is not None
    assert two.usage.prompt_tokens == 5


def test_log_probabilities_come_in_the_shape_of_each_route(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2)
    given = text.choices[0].logprobs
    assert given is not None
    assert given.tokens is not None
    assert given.token_logprobs is not None
    assert given.top_logprobs is not None
    assert len(given.tokens) == len(given.token_logprobs) == 6
    assert all(
        max(top.values()) == lp for top, lp in zip(given.top_logprobs, given.token_logprobs, strict=True)
    )
    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob


def test_a_stop_string_ends_the_text_before_it(worker: WorkerProcess, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:13]
    stopped = client.completions.create(**asked, stop=["never in it", stop])
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert (
        streamed_text(client.completions.create(**asked, stop=stop, stream=True)) == text[: text.index(stop)]
    )


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
    wait_for(lambda: not (worker.status().num_running or worker.status().num_waiting), 2, "it went on")
    stopped_after = time.monotonic() - began
    began = time.monotonic()
    client.completions.create(**LONG)
    assert stopped_after < 16 * (time.monotonic() - began), "as slow as if nobody had left"


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
        wait_for(lambda: not worker.status().num_running, 5, "it went on")
        busy.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)


def test_a_full_server_says_so(little_room: None, worker: WorkerProcess, service: Any) -> None:
    with service.client() as one, service.client() as other:
        stream = one.completions.create(**LONG, stream=True)
        next(iter(stream))
        with pytest.raises(openai.InternalServerError) as refused:
            other.completions.create(**LONG)
        assert (refused.value.status_code, refused.value.code) == (503, "engine_overloaded")
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 120
        with pytest.raises(openai.BadRequestError) as hopeless:
            other.completions.create(**LONG, n=2)
        assert hopeless.value.code == "request_too_large"
        stream.close()


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
    wait_for(lambda: any(worker.status().resident for worker in workers), 5, "no heartbeat shows the model")
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
    assert text + streamed_text(stream) == whole
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


def test_what_is_wrong_with_a_request_is_an_http_error_even_of_a_stream(
    worker: WorkerProcess, client: openai.OpenAI, register: Callable[..., str]
) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="lamp " * 300, max_tokens=8, stream=True)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="tiny", prompt=[100_000], max_tokens=8)
    assert unknown.value.param == "prompt"


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"best_of": 3}, "unsupported_parameter", "best_of"),
        ({"presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
        ({"logit_bias": {"5": 3}}, "unsupported_parameter", "logit_bias"),
        ({"min_p": 0.1}, "unknown_parameter", "min_p"),
        ({"temperature": 2.5}, "invalid_value", "temperature"),
        ({"n": 129}, "invalid_value", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 256}, "context_length_exceeded", "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [1, "a"]}, "invalid_value", "prompt[1]"),
        ({"prompt": None}, "invalid_value", "prompt"),
        ({"model": "absent"}, "model_not_found", "model"),
    ],
    ids=str,
)
def test_a_bad_completion_request_names_what_is_wrong(
    http: httpx.Client, register: Callable[..., str], change: dict[str, object], code: str, param: str
) -> None:
    register()
    error = http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT} | change).json()["error"]
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"prompt": "x"}, "unknown_parameter", "prompt"),
        ({"model": "plain"}, "no_chat_template", "messages"),
    ],
    ids=str,
)
def test_a_bad_chat_request_names_what_is_wrong(
    http: httpx.Client, register: Callable[..., str], change: dict[str, object], code: str, param: str
) -> None:
    register()
    register("plain", has_chat_template=False)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | change
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_parameters_without_effect_are_accepted(worker: WorkerProcess, client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    said: Any = first.choices[0].message.model_dump()
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": [{"type": "text", "text": "Be short."}]}, said],
        max_completion_tokens=4,
        store=True,
        metadata={"a": "b"},
        user="me",
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tool_choice="none",
    )
    assert answer.choices[0].finish_reason in {"stop", "length"}


def test_the_models_of_another_project_do_not_exist(service: Any, register: Callable[..., str]) -> None:
    register("theirs", project_id="other")
    with service.http() as http:
        answers = [
            http.post("/v1/completions", json={"model": name, "prompt": "x"}) for name in ("theirs", "absent")
        ]
    assert [answer.status_code for answer in answers] == [404, 404]
    bodies = [json.dumps(answer.json()).replace("theirs", "absent") for answer in answers]
    assert bodies[0] == bodies[1]


def test_a_key_without_the_scope_cannot_generate(service: Any, register: Callable[..., str]) -> None:
    register()
    with service.http(service.new_key(scopes=["models:read"])) as http:
        response = http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert response.status_code == 403
