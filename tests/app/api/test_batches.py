"""Batches over real HTTP with the stock client: judged at once, answered by a real worker, resumed after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import pytest
from openai.types import Batch

from app.local.embedded_servers import free_port
from app.services.batch import batches
from app.settings import Settings, get_settings
from app.storage import store
from tests.app.api.conftest import PROJECT, Service, jsonl
from tests.serve_worker import ROOT, WorkerProcess
from tests.waiting import wait_for

Json = dict[str, Any]  # Any: lines of a batch's files
COMPLETIONS: Final = "/v1/completions"
CHATS: Final = "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}


def line(number: int, url: str = COMPLETIONS, **body: Any) -> Json:
    given = {"model": "tiny", "prompt": f"What is {number}?", "max_tokens": 8, "temperature": 0}
    return {"custom_id": f"q-{number}", "method": "POST", "url": url, "body": given | body}


def long_line(number: int) -> Json:
    return line(number, max_tokens=120, ignore_eos=True)


def submit(
    client: openai.OpenAI, lines: Sequence[object], endpoint: Any = COMPLETIONS, **options: Any
) -> Batch:
    file = client.files.create(file=("requests.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options
    )


def wait_for_end(client: openai.OpenAI, batch_id: str, seconds: float = 30) -> Batch:
    wait_for(
        lambda: client.batches.retrieve(batch_id).status in ENDED, seconds, "the batch does not end"
    )
    return client.batches.retrieve(batch_id)


def num_completed(client: openai.OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed


def read(client: openai.OpenAI, file_id: str | None) -> list[Json]:
    if file_id is None:
        return []
    return [json.loads(raw) for raw in client.files.content(file_id).text.splitlines()]


def ids(*files: list[Json]) -> Counter[str]:
    return Counter(entry["custom_id"] for file in files for entry in file)


@pytest.fixture
def slow_batches(settings_env: Callable[..., Settings]) -> None:
    """Two sequences at once, so that a batch lasts for as long as a test needs."""
    settings_env(max_batch_sequences=2, serve_heartbeat_seconds=0.2)


@pytest.fixture
def idle_service(slow_batches: None, settings_env: Callable[..., Settings]) -> None:
    """The service of the test itself never looks for batches."""
    settings_env(reconcile_seconds=600)


def test_a_batch_is_answered_as_the_route_would_answer(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    lines = [line(number) for number in range(12)]
    lines[3]["body"]["max_tokens"] = 10_000
    batch = submit(client, lines, metadata={"team": "x"})
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"team": "x"})
    assert batch.expires_at == batch.created_at + 24 * 3600
    batch = wait_for_end(client, batch.id)
    assert (batch.status, batch.endpoint, batch.errors) == ("completed", COMPLETIONS, None)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 12, "completed": 11, "failed": 1}
    assert batch.in_progress_at is not None
    assert batch.finalizing_at is not None
    assert batch.completed_at is not None
    answers, errors = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert ids(answers, errors) == Counter({f"q-{number}": 1 for number in range(12)})
    asked: Json = lines[5]["body"]
    (answer,) = (entry for entry in answers if entry["custom_id"] == "q-5")
    assert answer["id"].startswith("batch_req_")
    assert answer["error"] is None
    assert answer["response"]["status_code"] == 200
    body = answer["response"]["body"]
    direct: Json = client.completions.create(**asked).to_dict()
    assert body["choices"] == direct["choices"]
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    used = [entry["response"]["body"]["usage"] for entry in answers]
    assert body["usage"]["total_tokens"] == direct["usage"]["total_tokens"]
    assert batch.model == "tiny"
    assert batch.usage is not None
    assert batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in used)
    assert batch.usage.output_tokens == sum(usage["completion_tokens"] for usage in used)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in used)
    assert batch.usage.input_tokens_details.cached_tokens == cached
    (failed,) = errors
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("q-3", 400)
    assert failed["response"]["body"]["error"]["code"] == "context_length_exceeded"
    file = client.files.retrieve(batch.output_file_id or "")
    assert (file.purpose, file.filename, file.expires_at) == (
        "batch_output",
        f"{batch.id}_output.jsonl",
        None,
    )
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_chats_are_answered_and_their_file_expires_when_asked_to(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    messages = [{"role": "user", "content": "What is a still?"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 8}
    request = {"custom_id": "only", "method": "POST", "url": CHATS, "body": body}
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    batch = wait_for_end(client, submit(client, [request], CHATS, output_expires_after=expiry).id)
    (answer,) = read(client, batch.output_file_id)
    assert answer["response"]["body"]["object"] == "chat.completion"
    assert batch.error_file_id is None
    file = client.files.retrieve(batch.output_file_id or "")
    assert file.expires_at is not None
    assert abs(file.expires_at - file.created_at - 3600) <= 1


@pytest.mark.parametrize("url", [COMPLETIONS, CHATS])
def test_a_stop_token_ends_an_answer_of_a_batch(
    worker: WorkerProcess, client: openai.OpenAI, url: str
) -> None:
    request = line(0, url, logit_bias={"40": 100}, stop_token_ids=[40], ignore_eos=True)
    if url == CHATS:
        request["body"]["messages"] = [{"role": "user", "content": request["body"].pop("prompt")}]
    batch = wait_for_end(client, submit(client, [request], url).id)
    (answer,) = read(client, batch.output_file_id)
    body = answer["response"]["body"]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 1


def test_a_cancelled_batch_stops_soon_and_keeps_what_it_has(
    slow_batches: None, worker: WorkerProcess, client: openai.OpenAI
) -> None:
    batch = submit(client, [long_line(number) for number in range(60)])
    wait_for(lambda: num_completed(client, batch.id) >= 2, 30, "nothing is answered")
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    assert worker.status().num_running <= 2
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = wait_for_end(client, batch.id, 5)
    wait_for(worker.is_idle, 5, "the worker goes on")
    assert (batch.status, batch.cancelled_at is not None) == ("cancelled", True)
    assert client.batches.cancel(batch.id).status == "cancelled"
    assert batch.request_counts is not None
    answers, rest = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert len(answers) == batch.request_counts.completed >= 2
    assert ids(answers, rest) == Counter({f"q-{number}": 1 for number in range(60)})
    assert {entry["error"]["code"] for entry in rest} == {"batch_cancelled"}
    assert {entry["response"] for entry in rest} == {None}
    client.files.delete(batch.input_file_id)


def test_a_batch_stays_back_while_requests_of_clients_wait(
    slow_batches: None, worker: WorkerProcess, client: openai.OpenAI
) -> None:
    many: Json = {"model": "tiny", "prompt": ["What is rain?"] * 12, "max_tokens": 240, "n": 128}
    stream = client.completions.create(**many, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    wait_for(lambda: worker.status().num_waiting, 5, "nobody waits")
    time.sleep(0.5)  # the API looks at heartbeats every 0.2 s
    batch = submit(client, [line(0)])
    wait_for(
        lambda: client.batches.retrieve(batch.id).status == "in_progress", 5, "nobody takes it"
    )
    time.sleep(0.5)
    assert worker.status().num_waiting
    assert num_completed(client, batch.id) == 0
    stream.close()
    assert wait_for_end(client, batch.id).status == "completed"


@pytest.mark.parametrize(
    ("number", "lease_seconds"),
    [(signal.SIGKILL, 4), (signal.SIGTERM, 300)],
    ids=["killed", "stopped"],
)
def test_another_process_goes_on_and_answers_each_line_once(
    idle_service: None,
    worker: WorkerProcess,
    start_api: "Callable[..., OtherApi]",
    service: Service,
    number: int,
    lease_seconds: float,
) -> None:
    first = start_api(STILLHOUSE_LEASE_SECONDS=str(lease_seconds))
    with service.client() as client, Service(first.url).client() as others:
        batch = submit(others, [long_line(n) for n in range(24)])
        wait_for(lambda: num_completed(client, batch.id) >= 2, 30, "nothing is answered")
        first.stop(number)
        assert client.batches.retrieve(batch.id).status == "in_progress"
        second = start_api(STILLHOUSE_RECONCILE_SECONDS="0.2")
        batch = wait_for_end(client, batch.id, 60)
        assert first.has_taken(batch.id)
        assert second.has_taken(batch.id)
        assert batch.status == "completed"
        assert batch.error_file_id is None
        answers = read(client, batch.output_file_id)
        assert ids(answers) == Counter({f"q-{n}": 1 for n in range(24)})
        assert {entry["response"]["body"]["usage"]["completion_tokens"] for entry in answers} == {
            120
        }


class OtherApi:
    """`stillhouse api` as a process of its own, on the same databases."""

    def __init__(self, log_path: Path, **environment: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log_path = log_path
        environment = dict(os.environ) | {"STILLHOUSE_PORT": str(port)} | environment
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "app.commands.cli", "api"]
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env=environment
            )
        wait_for(self._is_ready, 30, f"no answer; its log is {log_path}")

    def _is_ready(self) -> bool:
        try:
            return bool(httpx.get(f"{self.url}/health/ready").json()["serve_workers"] == 1)
        except httpx.TransportError:
            return False

    def has_taken(self, batch_id: str) -> bool:
        return any(
            "batch_taken" in raw and batch_id in raw
            for raw in self._log_path.read_text().splitlines()
        )

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(20)


@pytest.fixture
def start_api(tmp_path: Path) -> Iterator[Callable[..., OtherApi]]:
    started: list[OtherApi] = []

    def start(**environment: str) -> OtherApi:
        started.append(OtherApi(tmp_path / f"api-{len(started)}.log", **environment))
        return started[-1]

    yield start
    for api in started:
        api.process.kill()
        api.process.wait(10)


def test_what_is_wrong_with_the_lines_is_told_at_once(
    client: openai.OpenAI, register: Callable[..., str]
) -> None:
    register()
    register("secret", project_id="rival")
    bad: dict[str, Json] = {
        "missing_required_parameter prompt": line(1) | {"body": {"model": "tiny"}},
        "invalid_value temperature": line(2, temperature=9),
        "unknown_parameter colour": line(3, colour="red"),
        "unsupported_parameter stream": line(4, stream=True),
        "unsupported_parameter suffix": line(5, suffix="x"),
        "model_not_found model": line(6, model="secret"),
        "mismatched_endpoint url": line(7, url=CHATS),
        "invalid_method method": line(8) | {"method": "GET"},
        "duplicate_custom_id custom_id": line(0),
        "missing_required_parameter custom_id": {"method": "POST", "url": COMPLETIONS, "body": {}},
        "invalid_value body": line(9) | {"body": 3},
    }
    batch = submit(client, [line(0), *bad.values()])
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    data = batch.errors.data or []
    assert [f"{error.code} {error.param}" for error in data] == list(bad)
    assert [error.line for error in data] == list(range(2, 13))
    assert data[8].message == "the custom_id 'q-0' is already used on line 1"
    assert client.batches.retrieve(batch.id) == batch
    broken = client.files.create(file=("r.jsonl", b"{'a': 1}\n\n"), purpose="batch")
    batch = client.batches.create(
        input_file_id=broken.id, endpoint=COMPLETIONS, completion_window="24h"
    )
    assert batch.errors is not None
    codes = [(error.line, error.code) for error in batch.errors.data or []]
    assert codes == [(1, "invalid_json_line"), (2, "invalid_json_line")]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "48h"}, "completion_window"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_request_that_is_wrong_itself_is_refused(
    client: openai.OpenAI, http: httpx.Client, change: Json, param: str
) -> None:
    file = client.files.create(file=("r.jsonl", jsonl([line(0)])), purpose="batch")
    body: Json = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    response = http.post("/v1/batches", json=body | change)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert client.batches.list().data == []


def test_only_a_file_of_the_project_with_the_purpose_batch_is_taken(
    client: openai.OpenAI, stranger: openai.OpenAI
) -> None:
    rows = client.files.create(file=("r.jsonl", jsonl([{"prompt": "a"}])), purpose="fine-tune")
    foreign = stranger.files.create(file=("r.jsonl", jsonl([line(0)])), purpose="batch")
    errors: list[type[openai.APIStatusError]] = [
        openai.BadRequestError,
        openai.NotFoundError,
        openai.NotFoundError,
    ]
    for file_id, error in zip((rows.id, foreign.id, "file-nobody"), errors, strict=True):
        with pytest.raises(error) as refused:
            client.batches.create(
                input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h"
            )
        assert refused.value.param == "input_file_id"
    assert client.batches.list().data == []


def test_an_input_file_whose_content_is_lost_is_refused(client: openai.OpenAI) -> None:
    file = client.files.create(file=("r.jsonl", jsonl([line(0)])), purpose="batch")
    store().delete(f"files/{file.id}")
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
    assert (refused.value.code, refused.value.param) == ("invalid_file", "input_file_id")
    assert "upload it again" in refused.value.message


def test_a_batch_is_its_projects_own_and_listed_in_pages(
    client: openai.OpenAI, stranger: openai.OpenAI, service: Service
) -> None:
    made = [submit(client, [line(0, model="none")]).id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert ([batch.id for batch in page.data], page.has_more) == (made[:0:-1], True)
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]
    assert stranger.batches.list().data == []
    for ask in (stranger.batches.retrieve, stranger.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            ask(made[0])
    powerless = service.client(service.new_key(PROJECT, scopes=["jobs:read"]))
    with powerless, pytest.raises(openai.PermissionDeniedError):
        powerless.batches.list()


def test_a_batch_asked_for_twice_with_one_key_is_made_once(client: openai.OpenAI) -> None:
    file = client.files.create(file=("r.jsonl", jsonl([line(0, model="none")])), purpose="batch")
    headers = {"Idempotency-Key": "batch-1"}
    asked: Json = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    first, again = (client.batches.create(**asked, extra_headers=headers) for _ in range(2))
    assert first == again
    assert len(client.batches.list().data) == 1


def test_a_batch_that_the_sdk_sends_again_is_made_once(client: openai.OpenAI) -> None:
    file = client.files.create(file=("r.jsonl", jsonl([line(0, model="none")])), purpose="batch")
    asked: Json = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    first = client.batches.create(**asked)
    retried = client.batches.create(**asked, extra_headers={"x-stainless-retry-count": "1"})
    assert retried.id == first.id
    assert client.batches.create(**asked).id != first.id, "a second one that was asked for"


def test_batches_that_are_judged_leave_threads_to_the_others(client: openai.OpenAI) -> None:
    with ExitStack() as judging:
        for _ in range(8):
            judging.enter_context(batches.CHECKERS)
        with pytest.raises(openai.RateLimitError) as refused:
            submit(client, [line(0, model="none")])
        assert refused.value.response.headers["retry-after"]
    for _ in range(9):
        assert submit(client, [line(0, model="none")]).status == "failed"


@pytest.fixture
def impatient_service(settings_env: Callable[..., Settings]) -> None:
    settings_env(request_timeout_seconds=4, serve_heartbeat_seconds=0.2)


def test_a_model_that_never_loads_ends_its_requests_with_the_reason(
    impatient_service: None,
    worker: WorkerProcess,
    client: openai.OpenAI,
    register: Callable[..., str],
) -> None:
    register("broken")
    weights = get_settings().store_root() + "/models/broken/model.safetensors"
    Path(weights).write_bytes(b"no weights")
    batch = wait_for_end(client, submit(client, [line(0, model="broken"), line(1)]).id)
    assert batch.status == "completed"
    (failed,) = read(client, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("q-0", 503)
    assert failed["response"]["body"]["error"]["code"] == "model_load_failed"
    assert [answer["custom_id"] for answer in read(client, batch.output_file_id)] == ["q-1"]
