import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import text

from app.contracts.messages import ArtifactRef
from app.db import checkpoints, leases
from app.db import jobs as job_rows
from app.db import models as model_rows
from app.db.session import Session, transaction
from app.errors import NotFound
from app.services import model_registry
from app.storage import store
from tests.app.api.conftest import Service
from tests.waiting import wait_for

Register = Callable[..., str]


def wait_until_stuck(session: Session, *asked: Future[Any]) -> None:  # Any: whatever they give
    """Until each waits for a lock, if it is not done."""
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    wait_for(
        lambda: (session.scalar(waiting) or 0) + sum(one.done() for one in asked) >= len(asked),
        4,  # less than a lock is waited for
        "something else goes on",
    )


def test_models_are_listed_with_what_they_are_made_of(
    client: openai.OpenAI, register: Register
) -> None:
    register("tiny")
    register("shared", project_id=None)
    register("theirs", project_id="rival")
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"tiny", "shared"}
    assert listed["tiny"].owned_by == "acme"
    extra = client.models.retrieve("tiny").model_extra or {}
    assert (extra["num_layers"], extra["context_length"], extra["origin"]) == (4, 256, "imported")
    register("long", context_tokens=100_000)
    extra = client.models.retrieve("long").model_extra or {}
    assert extra["context_length"] == 2048  # the limit of the server
    register("bert", architecture="bert", family="masked")
    shown = {model.id: model.model_extra or {} for model in client.models.list()}
    assert (shown["tiny"]["family"], shown["bert"]["family"]) == ("causal", "masked")


def test_a_deleted_model_is_gone_with_its_bytes(client: openai.OpenAI, register: Register) -> None:
    register("tiny")
    assert client.models.delete("tiny").deleted is True
    assert not store().exists("models/tiny")
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("tiny")
    assert refused.value.code == "model_not_found"


def test_a_model_that_something_needs_stays(
    client: openai.OpenAI, register: Register, upload: Register
) -> None:
    register("tiny")
    method: Any = {"type": "distillation", "distillation": {"teacher": "tiny"}}
    file_id = upload(client, [{"prompt": "a", "completion": "b"}])
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method=method)
    with pytest.raises(openai.ConflictError) as refused:
        client.models.delete("tiny")
    assert refused.value.code == "resource_in_use"
    assert job.id in refused.value.message
    assert store().exists("models/tiny")


def test_a_job_that_is_just_being_queued_keeps_its_model(
    client: openai.OpenAI, register: Register, upload: Register
) -> None:
    register("tiny")
    asked: Any = {
        "method": {"type": "distillation", "distillation": {"teacher": "tiny"}},
        "model": "tiny",
    }
    asked["training_file"] = upload(client, [{"prompt": "a", "completion": "b"}])
    with ThreadPoolExecutor() as pool:
        with transaction() as session:
            # so that it is inserted, not committed
            session.execute(text("LOCK TABLE job_events IN SHARE MODE"))
            made = pool.submit(client.fine_tuning.jobs.create, **asked)
            wait_until_stuck(session, made)
            deleted = pool.submit(client.models.delete, "tiny")
            wait_until_stuck(session, made, deleted)
        with pytest.raises(openai.ConflictError) as refused:
            deleted.result()
    assert made.result().id in refused.value.message
    assert store().exists("models/tiny")


def test_a_model_that_is_just_being_deleted_gets_no_alias_and_no_job(
    http: httpx.Client, client: openai.OpenAI, register: Register, upload: Register
) -> None:
    register("tiny")
    asked: Any = {
        "method": {"type": "distillation", "distillation": {"teacher": "tiny"}},
        "model": "tiny",
    }
    asked["training_file"] = upload(client, [{"prompt": "a", "completion": "b"}])
    with ThreadPoolExecutor() as pool:
        with transaction() as session:
            assert model_rows.delete_model(session, "acme", "tiny")
            alias = pool.submit(http.put, "/v1/models/support/aliases/prod", json={"model": "tiny"})
            job = pool.submit(http.post, "/v1/fine_tuning/jobs", json=asked)
            wait_until_stuck(session, alias, job)
        answers = [answer.result() for answer in (alias, job)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert {answer.json()["error"]["code"] for answer in answers} == {"model_not_found"}


def test_another_projects_model_does_not_exist(
    client: openai.OpenAI, stranger: openai.OpenAI, register: Register
) -> None:
    register("tiny")
    for touch in (stranger.models.retrieve, stranger.models.delete):
        with pytest.raises(openai.NotFoundError):
            touch("tiny")
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_shared_model_is_deleted_by_an_admin_key_only(
    service: Service, client: openai.OpenAI, register: Register
) -> None:
    register("shared", project_id=None)
    with service.client(service.new_key(scopes=["models:read", "models:write"])) as tenant:
        with pytest.raises(openai.PermissionDeniedError) as refused:
            tenant.models.delete("shared")
        assert "admin" in refused.value.message
    assert store().exists("models/shared")
    assert client.models.delete("shared").deleted is True
    assert not store().exists("models/shared")


def test_an_alias_can_be_moved_and_is_resolved(
    http: httpx.Client, client: openai.OpenAI, register: Register
) -> None:
    register("old")
    register("new")
    for target in ("old", "new"):
        answer = http.put("/v1/models/support/aliases/prod", json={"model": target})
        assert (answer.status_code, answer.json()["id"], answer.json()["model"]) == (
            200,
            "support@prod",
            target,
        )
    assert client.models.retrieve("support@prod").id == "new"
    with transaction() as session:
        found = model_registry.resolve(session, "acme", "support@prod")
    assert (found.model_id, found.ref.key) == ("new", "models/new")
    with pytest.raises(openai.ConflictError):
        client.models.delete("new")
    assert http.delete("/v1/models/support/aliases/prod").json()["deleted"] is True
    assert http.delete("/v1/models/support/aliases/prod").status_code == 404
    assert client.models.delete("new").deleted is True


def test_an_alias_to_nothing_is_refused(http: httpx.Client) -> None:
    answer = http.put("/v1/models/support/aliases/prod", json={"model": "gone"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_aliases_of_projects_do_not_meet(
    http: httpx.Client, stranger: openai.OpenAI, register: Register
) -> None:
    register("shared", project_id=None)
    http.put("/v1/models/support/aliases/prod", json={"model": "shared"})
    with pytest.raises(openai.NotFoundError):
        stranger.models.retrieve("support@prod")


def test_a_checkpoint_of_a_running_job_can_be_served(
    client: openai.OpenAI, register: Register, upload: Register
) -> None:
    register("tiny")
    method: Any = {"type": "distillation", "distillation": {"teacher": "tiny"}}
    file_id = upload(client, [{"prompt": "a", "completion": "b"}])
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method=method).id
    with transaction() as session:
        job = leases.claim(session, "worker/1", 90.0)
        assert job is not None
        assert job.lease_token is not None
        ref = ArtifactRef(key=f"checkpoints/{job_id}/1/step-10", bytes=5, sha256="c" * 64)
        checkpoints.insert_checkpoint(
            session, job_id, job.lease_token, step=10, ref=ref, metrics={}, is_best=True
        )
    name = f"{job.model_id}:ckpt-step-10"
    with transaction() as session:
        found = model_registry.resolve(session, "acme", name)
        assert (found.model_id, found.ref.key) == (name, f"{ref.key}/model")
        with pytest.raises(NotFound):
            model_registry.resolve(session, "acme", f"{job.model_id}:ckpt-step-11")
        with pytest.raises(NotFound):
            model_registry.resolve(session, "rival", name)
    shown = client.models.retrieve(name)
    assert (shown.id, shown.owned_by) == (name, "acme")
    assert shown.to_dict()["job_id"] == job_id


def test_a_checkpoint_goes_with_its_model(
    client: openai.OpenAI, register: Register, upload: Register
) -> None:
    register("tiny")
    method: Any = {"type": "distillation", "distillation": {"teacher": "tiny"}}
    file_id = upload(client, [{"prompt": "a", "completion": "b"}])
    client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method=method)
    with transaction() as session:
        job = leases.claim(session, "worker/1", 90.0)
        tiny = model_rows.find_model(session, "acme", "tiny")
        assert job is not None
        assert job.lease_token is not None
        assert tiny is not None
        ref = ArtifactRef(key="checkpoints/a/1/step-10", bytes=5, sha256="c" * 64)
        checkpoints.insert_checkpoint(
            session, job.id, job.lease_token, step=10, ref=ref, metrics={}, is_best=True
        )
        columns: Any = {
            "store_key": "models/a",
            "bytes": 5,
            "manifest_sha256": "c" * 64,
            "facts": tiny.facts,
        }
        columns |= {"project_id": "acme", "origin": "distilled", "source_job_id": job.id}
        model_rows.insert_model(session, id=job.model_id, **columns)
    name = job.model_id

    def resolve() -> model_registry.Resolved:
        with transaction() as session:
            return model_registry.resolve(session, "acme", f"{name}:ckpt-step-10", lock=True)

    assert resolve().facts is not None
    with ThreadPoolExecutor() as pool:
        with transaction() as session:
            assert model_rows.delete_model(session, "acme", name)
            found = pool.submit(resolve)
            wait_until_stuck(session, found)
        with pytest.raises(NotFound):
            found.result()


def test_an_import_is_a_job_with_events(http: httpx.Client) -> None:
    asked = {"source": "hf:org/name@abc", "name": "imported"}
    made = http.post("/v1/models/import", json=asked).json()
    assert (made["object"], made["status"], made["name"], made["model"]) == (
        "model.import",
        "queued",
        "imported",
        None,
    )
    url = f"/v1/models/imports/{made['id']}"
    assert http.get(url).json() == made
    assert [event["data"] for event in http.get(f"{url}/events").json()["data"]] == [
        {"status": "queued"}
    ]
    assert http.post(f"{url}/cancel").json()["status"] == "cancelled"
    stream = http.get(f"{url}/events", headers={"accept": "text/event-stream"}).text
    assert re.findall(r"^data: \[DONE\]$", stream, re.MULTILINE)
    assert http.get(f"/v1/fine_tuning/jobs/{made['id']}").status_code == 404


@pytest.mark.parametrize(
    ("scopes", "is_allowed"),
    [(["models:write"], False), (["models:write", "hub:token"], True), (["admin"], True)],
)
def test_an_import_uses_the_hub_token_only_for_a_key_with_its_scope(
    service: Service, scopes: list[str], is_allowed: bool
) -> None:
    with service.http(service.new_key(scopes=scopes)) as http:
        created = http.post("/v1/models/import", json={"source": "hf:org/name", "name": "imported"})
    assert created.status_code == 200, created.text
    with transaction() as session:
        row = job_rows.load_job(session, created.json()["id"])
    assert row is not None
    assert row.spec["uses_hub_token"] is is_allowed


def test_a_name_is_given_once(http: httpx.Client, register: Register) -> None:
    asked = {"source": "hf:org/name", "name": "imported"}
    assert http.post("/v1/models/import", json=asked).status_code == 200
    second = http.post("/v1/models/import", json=asked)
    assert (second.status_code, second.json()["error"]["param"]) == (409, "name")
    register("tiny")
    assert http.post("/v1/models/import", json={**asked, "name": "tiny"}).status_code == 409


def test_an_import_is_idempotent(http: httpx.Client) -> None:
    asked = {"source": "hf:org/name", "name": "imported"}
    first, second = (
        http.post("/v1/models/import", json=asked, headers={"Idempotency-Key": "a"})
        for _ in range(2)
    )
    assert first.json() == second.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize(
    "source", ["/etc/passwd", "file:///etc", "hf:../x/y", "hf:a/b@../../c", "hf:a", "https://a/b"]
)
def test_nothing_but_a_hub_repository_is_imported_over_http(
    http: httpx.Client, source: str
) -> None:
    answer = http.post("/v1/models/import", json={"source": source, "name": "imported"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "source")
