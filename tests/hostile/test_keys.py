"""Every route × every wrong key, generated from the OpenAPI document: 401, 403 or 404 and nothing else."""

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import iter_route_contexts

from app import auth
from app.db import keys
from app.db.schema.webhook_tables import WebhookDelivery, WebhookEvent
from app.db.session import transaction
from app.main import create_app
from app.settings import Settings
from tests.app.api.conftest import Service, jsonl
from tests.stored_rows import insert, record

OPEN = {"/health/live", "/health/ready"}  # the whole list of what needs no key
# The dashboard's own files hold no data, and its pages send the user's key to the listed routes.
UNLISTED = {"/openapi.json", "/", "/dashboard/{version}/{path}"}
# Without its query a request is refused; the metrics are those of all projects.
NEEDS_QUERY = {"/metrics", "/tokenizer_info", "/v1/organization/usage/completions"}
ABSENT = "absent-0123456789"
Route = tuple[str, str]


@lru_cache
def document() -> dict[str, Any]:  # Any: OpenAPI
    paths: dict[str, Any] = create_app().openapi()["paths"]
    return paths


@pytest.fixture
def routes(settings_env: Callable[..., Settings]) -> list[Route]:
    return [
        (method.upper(), path)
        for path, operations in document().items()
        for method in operations
        if path not in OPEN
    ]


@pytest.fixture
def anyone(service: Service) -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(base_url=service.url, timeout=20) as made:
        yield made


def filled(path: str, ids: dict[str, str] | None = None) -> str:
    return re.sub(r"{(\w+)}", lambda match: (ids or {}).get(match[1], ABSENT), path)


def test_only_the_health_routes_are_open_and_no_route_hides(routes: list[Route]) -> None:
    app = create_app()
    open_routes = {
        path
        for path, operations in document().items()
        for o in operations.values()
        if not o.get("security")
    }
    assert open_routes == OPEN
    paths = {str(getattr(context, "path", "")) for context in iter_route_contexts(app.routes)}
    assert {path.replace(":path}", "}") for path in paths} <= set(document()) | UNLISTED


def bad_headers(service: Service) -> dict[str, bytes | None]:
    good, revoked = service.new_key(), service.new_key()
    expired = service.new_key(expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with transaction() as session:
        keys.revoke_key(session, revoked.split("-")[2])
    headers = {
        "none": None,
        "empty": "",
        "scheme alone": "Bearer",
        "other scheme": f"Basic {good}",
        "no scheme": good,
        "malformed": "Bearer sk-sh-zz",
        "wrong secret": f"Bearer {good[:-1]}{'a' if good[-1] != 'a' else 'b'}",
        "unknown id": f"Bearer sk-sh-{'0' * 16}-{good.split('-', 3)[3]}",
        "not ASCII": f"Bearer {good}é",
        "very long": f"Bearer sk-sh-{'0' * 16}-{'a' * 20_000}",
        "two keys": f"Bearer {good} {good}",
        "revoked": f"Bearer {revoked}",
        "expired": f"Bearer {expired}",
    }
    return {name: None if value is None else value.encode() for name, value in headers.items()}


def test_no_route_answers_a_wrong_key(
    service: Service, anyone: httpx.Client, routes: list[Route]
) -> None:
    wrong = []
    for name, header in bad_headers(service).items():
        headers = {} if header is None else {b"authorization": header}
        for method, path in routes:
            for content in (
                None,
                b"{",
                b"{}",
            ):  # a body that cannot be read tells a stranger nothing either
                answer = anyone.request(method, filled(path), headers=headers, content=content)
                is_right = (
                    answer.status_code == 401
                    and answer.json()["error"]["code"] == "invalid_api_key"
                )
                if not is_right or answer.headers["www-authenticate"] != "Bearer":
                    wrong.append(
                        (name, method, path, content, answer.status_code, answer.text[:200])
                    )
    assert wrong == []


def test_every_route_demands_one_scope_and_a_change_none_that_reads(
    service: Service, anyone: httpx.Client, routes: list[Route]
) -> None:
    single = {scope: service.new_key(scopes=[scope]) for scope in auth.SCOPES}
    wrong = []
    for method, path in routes:
        admitted = set()
        for scope, key in single.items():
            answer = anyone.request(
                method, filled(path), headers={"authorization": f"Bearer {key}"}
            )
            assert answer.status_code < 500, answer.text
            if answer.status_code != 403:
                admitted.add(scope)
        narrow = admitted - {"admin"}
        if (
            "admin" not in admitted
            or len(narrow) > 1
            or (method != "GET" and any("read" in s for s in narrow))
        ):
            wrong.append((method, path, sorted(admitted)))
    assert wrong == []


@pytest.fixture
def belongings(
    service: Service, client: openai.OpenAI, http: httpx.Client, register: Callable[..., str]
) -> dict[str, str]:
    """One object of each kind that the project `acme` owns, by the names that routes and bodies give to their ids."""
    register()
    rows = [{"prompt": f"Ask {i}", "completion": "Answer."} for i in range(4)]
    file = client.files.create(file=("rows.jsonl", jsonl(rows)), purpose="fine-tune").id
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "tiny", "prompt": "a"},
    }
    asked = client.files.create(file=("asked.jsonl", jsonl([line])), purpose="batch").id
    method: Any = {
        "type": "distillation",
        "distillation": {"teacher": "tiny", "student": {"num_layers": 2}},
    }
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, method=method).id
    batch = client.batches.create(
        input_file_id=asked, endpoint="/v1/completions", completion_window="24h"
    ).id
    alias = http.put("/v1/models/tiny/aliases/live", json={"model": "tiny"})
    assert alias.status_code == 200, alias.text
    brought = http.post("/v1/models/import", json={"source": "hf:a/b", "name": "brought"}).json()[
        "id"
    ]
    insert([record(1)])
    made = http.post("/v1/datasets", json={"name": "kept"})
    assert made.status_code == 200, made.text
    endpoint = client.webhooks.create(
        name="kept", url="https://hooks.example.com/kept", event_types=["batch.completed"]
    )
    return {
        "webhook_endpoint_id": endpoint.id,
        "delivery_id": add_delivery(endpoint.id),
        "completion_id": "chatcmpl-0001",
        "dataset_id": made.json()["id"],
        "file_name": "config.json",
        "file_id": file,
        "job_id": job,
        "import_id": brought,
        "batch_id": batch,
        "model_id": "tiny",
        "name": "tiny",
        "alias": "live",
        "asked_id": asked,
    }


def add_delivery(endpoint_id: str) -> str:
    """Adds a delivery that has ended, so that nothing is sent."""
    with transaction() as session:
        event = WebhookEvent(
            id="evt_1", project_id="acme", type="batch.completed", data={"id": "b"}
        )
        session.add(event)
        session.flush()
        session.add(
            WebhookDelivery(
                id="whd_1", event_id=event.id, endpoint_id=endpoint_id, status="succeeded"
            )
        )
    return "whd_1"


def bodies(ids: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """What a stranger would send to reach another project's objects; each is a 404."""
    method = {
        "type": "distillation",
        "distillation": {"teacher": ids["model_id"], "student": {"num_layers": 2}},
    }
    message = {"role": "user", "content": "a"}
    job = {"model": ids["model_id"], "training_file": ids["file_id"], "method": method}
    return {
        "/v1/fine_tuning/jobs": [job],
        "/v1/fine_tuning/jobs/estimate": [job],
        "/v1/completions": [
            {"model": name, "prompt": "a"} for name in (ids["model_id"], "tiny@live")
        ],
        "/v1/chat/completions": [{"model": ids["model_id"], "messages": [message]}],
        "/v1/responses": [{"model": ids["model_id"], "input": "a"}],
        "/v1/responses/input_tokens": [{"model": ids["model_id"], "input": "a"}],
        "/tokenize": [{"model": ids["model_id"], "prompt": "a"}],
        "/detokenize": [{"model": ids["model_id"], "tokens": [5]}],
        "/v1/batches": [
            {
                "input_file_id": ids["asked_id"],
                "endpoint": "/v1/completions",
                "completion_window": "24h",
            }
        ],
        "/v1/models/{name}/aliases/{alias}": [{"model": ids["model_id"]}],
        "/v1/models/{model_id}/serving": [{}, {"draft": {"model": ids["model_id"]}}],
        "/v1/models/{name}/aliases/{alias}/rollback": [{}],
        "/v1/chat/completions/{completion_id}": [{"metadata": {"a": "b"}}],
        "/v1/webhook_endpoints/{webhook_endpoint_id}": [{"name": "b"}],
        "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": [{}],
        "/v1/webhook_endpoints/{webhook_endpoint_id}/test": [{"event_type": "batch.completed"}],
        "/v1/webhook_endpoints": [],  # names nothing that anybody owns, as the next four
        "/v1/datasets": [],
        "/v1/models/imports": [],
        "/v1/models/import": [],
        "/v1/files": [],
    }


def test_another_projects_objects_do_not_exist(
    service: Service, anyone: httpx.Client, routes: list[Route], belongings: dict[str, str]
) -> None:
    headers = {"authorization": f"Bearer {service.new_key('rival')}"}
    asked = bodies(belongings)
    wrong: list[tuple[object, ...]] = []
    for method, path in routes:
        has_body = "requestBody" in document()[path][method.lower()]
        assert not has_body or path in asked, (
            f"say in bodies() how a stranger would use {method} {path}"
        )
        for body in asked[path] if has_body else [None]:
            for kind in ("job_id", "import_id") if "{job_id}" in path else ("job_id",):
                ids = belongings | {"job_id": belongings[kind]}
                theirs = anyone.request(method, filled(path, ids), headers=headers, json=body)
                # a list, the metrics of all projects, or a route whose query names the model
                if "{" not in path and not has_body:
                    named = [value for value in belongings.values() if f'"{value}"' in theirs.text]
                    if path not in NEEDS_QUERY and (theirs.status_code != 200 or named):
                        wrong.append((method, path, theirs.status_code, named))
                    continue
                absent = anyone.request(method, filled(path), headers=headers, json=body)
                same = theirs.text.replace("tiny", ABSENT).replace("live", ABSENT)
                for value in ids.values():
                    same = same.replace(value, ABSENT)
                if theirs.status_code != 404 or (
                    "{" in path and not has_body and absent.text != same
                ):
                    wrong.append(
                        (method, path, theirs.status_code, theirs.text[:200], absent.text[:200])
                    )
    assert wrong == []


def test_the_tokenizer_of_another_projects_model_does_not_exist(
    service: Service, anyone: httpx.Client, belongings: dict[str, str]
) -> None:
    headers = {"authorization": f"Bearer {service.new_key('rival')}"}
    query = {"model": belongings["model_id"]}
    answer = anyone.get("/tokenizer_info", params=query, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_the_owner_does_reach_them(
    http: httpx.Client, routes: list[Route], belongings: dict[str, str]
) -> None:
    """The matrix above would be empty talk if nobody could."""
    reached = [
        path
        for method, path in routes
        if method == "GET" and http.get(filled(path, belongings)).status_code == 200
    ]
    assert {
        "/v1/files/{file_id}",
        "/v1/fine_tuning/jobs/{job_id}",
        "/v1/batches/{batch_id}",
        "/v1/datasets/{dataset_id}",
        "/v1/chat/completions/{completion_id}",
        "/v1/models/{model_id}/files/{file_name}",
    } <= set(reached)
