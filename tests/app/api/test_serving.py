"""How a model is served, and what the serve workers keep of it: over HTTP, with a real worker."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from app.settings import Settings
from tests.serve_worker import WorkerProcess
from tests.waiting import wait_for

Register = Callable[..., str]
PLAIN = {"engine": "transformers", "weights": "auto", "draft": None}


def state_of(http: httpx.Client, model: str = "tiny") -> dict[str, Any]:
    """The one worker's state; nothing until its heartbeat is seen."""
    workers: list[dict[str, Any]] = http.get(f"/v1/models/{model}/status").json()["workers"]
    return workers[0] if workers else {"state": None}


def wait_until(http: httpx.Client, state: str, model: str = "tiny") -> dict[str, Any]:
    wait_for(lambda: state_of(http, model)["state"] == state, 20, f"{model} is not {state}")
    return state_of(http, model)


@pytest.fixture
def small_workers(settings_env: Callable[..., Settings]) -> None:
    settings_env(resident_model_bytes=1_000_000)  # the tiny model has some 700,000


def test_a_model_is_served_the_plain_way_unless_told_otherwise(
    http: httpx.Client, client: openai.OpenAI, register: Register
) -> None:
    register("tiny")
    register("student")
    asked = {"weights": "int8", "draft": {"model": "student", "num_tokens": 3}}
    shown = {"engine": "transformers", **asked}
    assert http.get("/v1/models/tiny/serving").json() == {
        "object": "model.serving",
        "model": "tiny",
        **PLAIN,
    }
    answer = http.put("/v1/models/tiny/serving", json=asked)
    assert (answer.status_code, answer.json()) == (
        200,
        {"object": "model.serving", "model": "tiny", **shown},
    )
    assert (client.models.retrieve("tiny").model_extra or {})["serving"] == shown
    with pytest.raises(openai.ConflictError, match="tiny \\(as its draft\\)"):
        client.models.delete("student")
    http.put("/v1/models/tiny/serving", json={})
    assert (client.models.retrieve("tiny").model_extra or {})["serving"] == PLAIN
    client.models.delete("student")


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_every_engine_takes_a_draft(http: httpx.Client, register: Register, engine: str) -> None:
    register("tiny")
    register("student")
    asked = {"engine": engine, "draft": {"model": "student", "num_tokens": 3}}
    answer = http.put("/v1/models/tiny/serving", json=asked).json()
    assert answer | asked == answer


@pytest.mark.parametrize(
    ("asked", "status", "code", "param"),
    [
        ({"draft": {"model": "gone"}}, 404, "model_not_found", "draft.model"),
        ({"draft": {"model": "theirs"}}, 404, "model_not_found", "draft.model"),
        ({"draft": {"model": "tiny"}}, 400, "incompatible_draft", "draft.model"),
        ({"draft": {"model": "other-words"}}, 400, "incompatible_draft", "draft.model"),
        ({"draft": {"model": "wider"}}, 400, "incompatible_draft", "draft.model"),
        ({"draft": {"model": "t5"}}, 400, "incompatible_draft", "draft.model"),
        ({"draft": {"model": "twin", "num_tokens": 17}}, 400, None, "draft.num_tokens"),
        ({"engine": "vllm", "weights": "int8"}, 400, "incompatible_options", "weights"),
        ({"engine": "tgi"}, 400, None, "engine"),
        ({"speed": "high"}, 400, None, "speed"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(
    http: httpx.Client,
    register: Register,
    asked: dict[str, Any],
    status: int,
    code: str | None,
    param: str,
) -> None:
    register("tiny")
    register("twin")
    register("theirs", project_id="rival")
    register("other-words", tokenizer_sha256="u" * 64)
    register("wider", vocab_size=400)
    register("t5", family="seq2seq", architecture="t5")
    answer = http.put("/v1/models/tiny/serving", json=asked)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert code in (None, error["code"])
    assert http.get("/v1/models/tiny/serving").json()["draft"] is None


def test_a_model_that_writes_no_text_is_not_served(http: httpx.Client, register: Register) -> None:
    register("bert", family="masked", architecture="bert")
    register("t5", family="seq2seq", architecture="t5")
    for answer in (http.put("/v1/models/bert/serving", json={}), http.post("/v1/models/bert/load")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_servable")
    answer = http.put("/v1/models/t5/serving", json={"engine": "vllm"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "engine")


def test_a_shared_model_is_an_operators_to_decide_about(service: Any, register: Register) -> None:
    register("shared", project_id=None)
    register("own")
    with service.http(service.new_key(scopes=["models:read", "models:write"])) as narrow:
        assert narrow.get("/v1/models/shared/serving").status_code == 200
        assert narrow.put("/v1/models/shared/serving", json={}).status_code == 403
        assert narrow.post("/v1/models/shared/unload").status_code == 403
        assert narrow.post("/v1/models/own/pin").status_code == 403
    with service.http() as operator:
        assert operator.put("/v1/models/shared/serving", json={}).status_code == 200
        answer = operator.put("/v1/models/shared/serving", json={"draft": {"model": "own"}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "draft.model")


@pytest.mark.parametrize("route", ["serving", "status", "load", "unload", "pin", "unpin"])
def test_another_projects_model_does_not_exist(
    service: Any, register: Register, route: str
) -> None:
    register("tiny")
    method = "GET" if route in ("serving", "status") else "POST"
    with service.http(service.new_key("rival")) as stranger:
        answer = stranger.request(method, f"/v1/models/tiny/{route}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_without_a_worker_nothing_can_be_loaded(http: httpx.Client, register: Register) -> None:
    register("tiny")
    answer = http.post("/v1/models/tiny/load")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    status = http.get("/v1/models/tiny/status").json()
    assert (status["state"], status["workers"]) == ("absent", [])


def test_options_reach_the_worker_with_each_request(
    worker: WorkerProcess, http: httpx.Client, client: openai.OpenAI
) -> None:
    client.completions.create(model="tiny", prompt="lamp", max_tokens=2)
    http.put("/v1/models/tiny/serving", json={"engine": "vllm"})
    with pytest.raises(openai.InternalServerError, match="no serve worker with vLLM"):
        client.completions.create(model="tiny", prompt="lamp", max_tokens=2)
    http.put("/v1/models/tiny/serving", json={})
    client.completions.create(model="tiny", prompt="lamp", max_tokens=2)


def test_a_model_is_loaded_and_unloaded_when_asked(
    worker: WorkerProcess, http: httpx.Client
) -> None:
    http.post("/v1/models/tiny/unload")
    assert wait_until(http, "absent") == {
        "worker": worker.id, "state": "absent", "bytes": None, "percent": 0.0,
        "weights": None, "load_seconds": None, "first_token_ms": None, "acceptance_rate": None, "error": None,
    }  # fmt: skip
    for _ in range(2):
        answer = http.post("/v1/models/tiny/load")
        assert (answer.status_code, answer.json()["object"]) == (202, "model.status")
        assert answer.json()["state"] in ("loading", "resident")
    found = wait_until(http, "resident")
    assert found["percent"] == 100.0
    assert 0 < found["first_token_ms"] < 60_000
    assert 0 < found["load_seconds"] < 60
    assert found["weights"] == "plain"
    assert found["bytes"] > 100_000
    assert http.get("/health/ready").json()["stalled_serve_workers"] == 0
    assert http.post("/v1/models/tiny/unload").status_code == 202
    wait_until(http, "absent")


def test_readiness_tells_the_age_of_the_last_forward_pass(
    worker: WorkerProcess, http: httpx.Client, client: openai.OpenAI
) -> None:
    client.completions.create(model="tiny", prompt="lamp", max_tokens=2)
    began = time.monotonic()

    def age() -> float | None:
        found: float | None = http.get("/health/ready").json()["last_forward_seconds"]
        return found

    wait_for(lambda: (now := age()) is not None and now > 0.6, 5, "the age does not grow")
    client.completions.create(model="tiny", prompt="lamp", max_tokens=2)
    wait_for(
        lambda: (now := age()) is not None and now < time.monotonic() - began,
        5,
        "no pass was noticed",
    )


def test_a_pinned_alias_is_loaded_wherever_it_points(
    worker: WorkerProcess, http: httpx.Client, register: Register
) -> None:
    register("next")
    http.put("/v1/models/support/aliases/prod", json={"model": "tiny"})
    answer = http.post("/v1/models/support@prod/pin")
    assert (answer.status_code, answer.json()["model"], answer.json()["is_pinned"]) == (
        202,
        "tiny",
        True,
    )
    wait_until(http, "resident")
    refused = http.post("/v1/models/tiny/unload")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_pinned")
    http.put("/v1/models/support/aliases/prod", json={"model": "next"})
    wait_until(http, "resident", "next")
    assert http.get("/v1/models/support@prod/status").json()["is_pinned"]
    answer = http.post("/v1/models/support@prod/unpin")
    assert answer.json()["is_pinned"] is False
    for name in ("tiny", "next"):
        assert http.post(f"/v1/models/{name}/unload").status_code == 202
        wait_until(http, "absent", name)


def test_more_cannot_be_pinned_than_a_worker_keeps(
    small_workers: None, http: httpx.Client, register: Register
) -> None:
    register("one")
    register("two")
    assert http.post("/v1/models/one/pin").status_code == 202
    refused = http.post("/v1/models/two/pin")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "pins_exceed_memory")
    http.post("/v1/models/one/unpin")
    assert http.post("/v1/models/two/pin").status_code == 202
