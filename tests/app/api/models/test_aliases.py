"""History, rollback and compare-and-set of aliases, over real HTTP."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from app.db import models
from app.db.session import transaction
from tests.app.api.conftest import Service, refusal
from tests.app.api.test_models import wait_until_stuck

Register = Callable[..., str]
URL = "/v1/models/support/aliases/prod"


@pytest.fixture
def three(register: Register) -> tuple[str, ...]:
    return tuple(register(name) for name in ("m1", "m2", "m3"))


def point(http: httpx.Client, model: str, **body: str) -> httpx.Response:
    return http.put(URL, json={"model": model, **body})


def moves(http: httpx.Client, **query: Any) -> list[tuple[str | None, str | None]]:
    return [
        (change["from"], change["to"])
        for change in http.get(f"{URL}/history", params=query).json()["data"]
    ]


def test_each_change_of_an_alias_is_kept_with_the_key_that_made_it(
    service: Service, three: tuple[str, ...]
) -> None:
    first_key, second_key = service.new_key(), service.new_key()
    with service.http(first_key) as first, service.http(second_key) as second:
        assert point(first, "m1").status_code == 200
        assert point(second, "m2").json()["model"] == "m2"
        point(second, "m2")  # changes nothing
        assert first.get(URL).json()["model"] == "m2"
        assert second.delete(URL).status_code == 200
        page = first.get(f"{URL}/history").json()
    assert [(change["from"], change["to"]) for change in page["data"]] == [
        ("m2", None),
        ("m1", "m2"),
        (None, "m1"),
    ]
    ids = [key.split("-")[2] for key in (second_key, second_key, first_key)]
    assert [change["key_id"] for change in page["data"]] == ids
    assert {change["object"] for change in page["data"]} == {"model.alias.change"}
    assert {change["alias"] for change in page["data"]} == {"support@prod"}
    with service.http(first_key) as first:
        assert first.get(URL).status_code == 404


def test_the_history_has_pages_in_both_orders(http: httpx.Client, three: tuple[str, ...]) -> None:
    for model in ("m1", "m2", "m3", "m1"):
        point(http, model)
    history = [("m3", "m1"), ("m2", "m3"), ("m1", "m2"), (None, "m1")]
    assert moves(http) == history
    assert moves(http, order="asc") == history[::-1]
    first = http.get(f"{URL}/history", params={"limit": 3}).json()
    assert (len(first["data"]), first["has_more"]) == (3, True)
    assert moves(http, after=first["last_id"]) == history[3:]
    unknown = http.get(f"{URL}/history", params={"after": "aliasevt-none"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "after")


def test_a_rollback_returns_to_the_model_before(http: httpx.Client, three: tuple[str, ...]) -> None:
    for model in ("m1", "m2"):
        point(http, model)
    assert http.post(f"{URL}/rollback").json()["model"] == "m1"
    assert http.get("/v1/models/support@prod").json()["id"] == "m1"
    assert http.post(f"{URL}/rollback", json={}).json()["model"] == "m2"
    http.delete(URL)
    assert http.post(f"{URL}/rollback").json()["model"] == "m2"
    assert http.get("/v1/models/support@prod").json()["id"] == "m2"
    assert moves(http)[0] == (None, "m2")


def test_a_repeated_rollback_is_refused_if_it_names_the_model_it_leaves(
    http: httpx.Client, three: tuple[str, ...]
) -> None:
    for model in ("m1", "m2"):
        point(http, model)
    body = {"from": "m2"}
    assert http.post(f"{URL}/rollback", json=body).json()["model"] == "m1"
    again = http.post(f"{URL}/rollback", json=body)
    assert refusal(again) == (409, "alias_moved", "from")
    assert again.headers["x-should-retry"] == "false"
    assert refusal(point(http, "m3", **{"from": "m2"})) == (409, "alias_moved", "from")
    assert point(http, "m3", **{"from": "m1"}).status_code == 200


def test_a_rollback_to_nothing_is_refused(
    http: httpx.Client, client: openai.OpenAI, three: tuple[str, ...]
) -> None:
    assert refusal(http.post(f"{URL}/rollback")) == (404, "model_not_found", "alias")
    assert refusal(http.get(f"{URL}/history")) == (404, "model_not_found", "alias")
    point(http, "m1")
    assert refusal(http.post(f"{URL}/rollback")) == (409, "no_earlier_model", "alias")
    point(http, "m2")
    assert client.models.delete("m1").deleted
    assert refusal(http.post(f"{URL}/rollback")) == (409, "model_not_found", "alias")
    assert moves(http) == [("m1", "m2"), (None, "m1")]


def test_concurrent_moves_make_one_unbroken_history(
    service: Service, three: tuple[str, ...]
) -> None:
    def move(number: int) -> None:
        with service.http() as http:
            assert point(http, three[number % 3]).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(move, range(24)))
    with service.http() as http:
        history = moves(http, order="asc", limit=100)
        now = http.get(URL).json()["model"]
    assert history[0][0] is None
    assert history[-1][1] == now
    assert [change[0] for change in history[1:]] == [change[1] for change in history[:-1]]


def test_the_history_of_another_project_does_not_exist(
    service: Service, http: httpx.Client, three: tuple[str, ...]
) -> None:
    point(http, "m1")
    with service.http(service.new_key("rival")) as stranger:
        assert stranger.get(f"{URL}/history").status_code == 404
        assert stranger.post(f"{URL}/rollback").status_code == 404
    with service.http(service.new_key(scopes=["models:read"])) as reader:
        assert reader.get(f"{URL}/history").status_code == 200
        assert reader.post(f"{URL}/rollback").status_code == 403


def test_a_model_that_is_being_deleted_is_not_rolled_back_to(
    http: httpx.Client, three: tuple[str, ...]
) -> None:
    for model in ("m1", "m2"):
        point(http, model)
    with ThreadPoolExecutor() as pool:
        with transaction() as session:
            assert models.delete_model(session, "acme", "m1")
            back = pool.submit(http.post, f"{URL}/rollback")
            wait_until_stuck(session, back)
        assert refusal(back.result()) == (409, "model_not_found", "alias")
