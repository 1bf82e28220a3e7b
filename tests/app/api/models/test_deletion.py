"""A model that something uses is not deleted, over real HTTP."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import text

from app.db import models
from app.db.session import transaction
from app.storage import store
from tests.app.api.conftest import Service
from tests.app.api.test_batches import line, submit
from tests.app.api.test_models import wait_until_stuck

Register = Callable[..., str]


def refused(client: openai.OpenAI, model: str = "tiny") -> str:
    with pytest.raises(openai.ConflictError) as error:
        client.models.delete(model)
    assert error.value.code == "resource_in_use"
    assert error.value.param == "model"
    assert store().exists(f"models/{model}")
    return error.value.message


def test_a_pinned_model_is_not_deleted(
    http: httpx.Client, client: openai.OpenAI, register: Register
) -> None:
    register("tiny")
    assert http.post("/v1/models/tiny/pin").status_code == 202
    assert "a pin" in refused(client)
    assert http.post("/v1/models/tiny/unpin").status_code == 202
    assert client.models.delete("tiny").deleted


def test_a_model_of_an_unfinished_batch_is_not_deleted(
    client: openai.OpenAI, register: Register
) -> None:
    register("tiny")
    register("other")
    batch = submit(client, [line(1), line(2)])
    assert batch.id in refused(client)
    assert client.models.delete("other").deleted
    client.batches.cancel(batch.id)
    with transaction() as session:
        session.execute(
            text(
                "UPDATE batches SET status = 'cancelled', lease_token = NULL, lease_expires_at = NULL"
            )
        )
    assert client.models.delete("tiny").deleted


def test_an_alias_of_an_unfinished_batch_is_not_deleted(
    http: httpx.Client, client: openai.OpenAI, register: Register
) -> None:
    register("tiny")
    http.put("/v1/models/support/aliases/prod", json={"model": "tiny"})
    batch = submit(client, [line(1, model="support@prod")])
    answer = http.delete("/v1/models/support/aliases/prod")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "resource_in_use")
    assert batch.id in answer.json()["error"]["message"]
    assert http.get("/v1/models/support/aliases/prod").json()["model"] == "tiny"
    assert "support@prod" in refused(client)


def test_a_shared_model_with_an_alias_of_another_project_is_not_deleted(
    service: Service, client: openai.OpenAI, register: Register
) -> None:
    register("tiny", project_id=None)
    with service.http(service.new_key("rival")) as rival:
        rival.put("/v1/models/theirs/aliases/prod", json={"model": "tiny"})
    assert "theirs@prod" in refused(client)


def test_a_batch_that_is_just_being_created_keeps_its_model(
    client: openai.OpenAI, register: Register
) -> None:
    register("tiny")
    with ThreadPoolExecutor() as pool:
        with transaction() as session:
            # so that the batch is inserted, not committed
            session.execute(text("LOCK TABLE batch_models IN SHARE MODE"))
            creation = pool.submit(submit, client, [line(1)])
            wait_until_stuck(session, creation)
            deleted = pool.submit(client.models.delete, "tiny")
            wait_until_stuck(session, creation, deleted)
        with pytest.raises(openai.ConflictError) as error:
            deleted.result()
    assert creation.result().id in error.value.message


def test_a_model_that_is_just_being_deleted_gets_no_pin(
    http: httpx.Client, register: Register
) -> None:
    register("tiny")
    with ThreadPoolExecutor() as pool:
        with transaction() as session:
            assert models.delete_model(session, "acme", "tiny")
            pinned = pool.submit(http.post, "/v1/models/tiny/pin")
            wait_until_stuck(session, pinned)
        assert pinned.result().status_code == 404


def test_of_two_deletions_at_once_one_finds_the_model_gone(
    client: openai.OpenAI, register: Register
) -> None:
    register("tiny")

    def delete(_: int) -> Any:  # Any: an answer or an error of the client
        try:
            return client.models.delete("tiny").deleted
        except openai.NotFoundError as error:
            return error.status_code

    with ThreadPoolExecutor(4) as pool:
        answers = sorted(map(str, pool.map(delete, range(4))))
    assert answers == ["404", "404", "404", "True"]
