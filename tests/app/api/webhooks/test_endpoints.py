"""Webhook endpoints as the stock client manages them, and events that reach a real receiver."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from app.db.webhooks.outbox import EVENT_TYPES
from app.settings import Settings
from tests.app.api.conftest import PROJECT, Service, refusal
from tests.webhook_receiver import Receiver, open_receiver

TYPES: Any = ["fine_tuning.job.cancelled", "batch.failed"]  # Any: the client's literals
URL = "https://example.com/hook"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with open_receiver() as receiver:
        yield receiver


@pytest.fixture
def settings_env(settings_env: Callable[..., Settings]) -> Callable[..., Settings]:
    """The settings of the service, which allow a receiver on this machine."""
    settings_env(webhook_allowed_hosts="localhost, hooks.internal")
    return settings_env


def test_the_life_of_an_endpoint(
    client: openai.OpenAI, stranger: openai.OpenAI, http: httpx.Client
) -> None:
    assert client.webhooks.event_types.list().data == list(EVENT_TYPES)
    created = client.webhooks.create(event_types=[*TYPES, TYPES[0]], name="My hook", url=URL)
    assert created.object == "webhook_endpoint"
    assert created.signing_secret.startswith("whsec_")
    assert created.event_types == TYPES

    found = client.webhooks.retrieve(created.id)
    assert (found.name, found.url, found.created_at) == ("My hook", URL, created.created_at)
    hint = found.signing_secret_hint
    assert hint
    assert created.signing_secret.rstrip("=").endswith(hint.removeprefix("whsec_..."))
    assert len(hint) < 20

    other = client.webhooks.create(event_types=TYPES, name="other", url=URL)
    assert [row.id for row in client.webhooks.list(limit=1)] == [other.id, created.id]
    assert list(stranger.webhooks.list()) == []
    unknown = http.get("/v1/webhook_endpoints?enabled=true")
    assert refusal(unknown)[:2] == (400, "unknown_parameter")

    unchanged = client.webhooks.update(created.id, name="My hook")
    assert unchanged == found
    changed = client.webhooks.update(created.id, name="New name", event_types=["batch.expired"])
    assert (changed.name, changed.event_types, changed.url) == ("New name", ["batch.expired"], URL)

    rotated = client.webhooks.rotate_secret(created.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret not in ("", created.signing_secret)
    bodies = [http.get(f"/v1/webhook_endpoints{path}").text for path in ("", f"/{created.id}")]
    for secret in (created.signing_secret, rotated.signing_secret, other.signing_secret):
        assert not any(secret in body for body in bodies)

    for call in (
        stranger.webhooks.retrieve,
        stranger.webhooks.delete,
        stranger.webhooks.rotate_secret,
        stranger.webhooks.update,
    ):
        with pytest.raises(openai.NotFoundError):
            call(created.id)
    with pytest.raises(openai.NotFoundError):
        stranger.webhooks.test(created.id, event_type="batch.failed")

    gone = client.webhooks.delete(created.id)
    assert (gone.id, gone.object, gone.deleted) == (created.id, "webhook_endpoint.deleted", True)
    with pytest.raises(openai.NotFoundError):
        client.webhooks.delete(created.id)
    assert [row.id for row in client.webhooks.list()] == [other.id]


def test_an_event_of_a_job_is_delivered_logged_and_replayed(
    client: openai.OpenAI,
    stranger: openai.OpenAI,
    http: httpx.Client,
    receiver: Receiver,
    register: Callable[..., str],
    upload: Callable[..., str],
) -> None:
    register()
    created = client.webhooks.create(event_types=TYPES, name="hook", url=receiver.url)
    tested = client.webhooks.test(created.id, event_type="batch.failed")
    assert (tested.object, tested.status_code, tested.success) == (
        "webhook_endpoint.test",
        200,
        True,
    )
    rows = [{"prompt": f"Ask {i}", "completion": "Answer."} for i in range(6)]
    method: Any = {"type": "distillation", "distillation": {"teacher": "tiny"}}
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, rows), method=method
    )
    client.fine_tuning.jobs.cancel(job.id)
    sample, received = receiver.wait_for(2)
    for request in (sample, received):
        event: Any = client.webhooks.unwrap(
            request.body, request.headers, secret=created.signing_secret
        )
    assert sample.event["type"] == "batch.failed"
    assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", job.id)

    path = f"/v1/webhook_endpoints/{created.id}/deliveries"
    (delivery,) = http.get(path).json()["data"]
    assert delivery["event"] == received.event
    assert delivery["webhook_endpoint_id"] == created.id
    assert refusal(http.get(f"{path}?status=lost"))[0] == 400
    assert refusal(http.get(f"{path}?state=failed"))[:2] == (400, "unknown_parameter")

    replay_path = f"{path}/{delivery['id']}/replay"
    assert http.post(replay_path).json()["status"] == "pending"
    *_, again = receiver.wait_for(3)
    assert again.body == received.body
    assert again.headers["webhook-id"] == received.headers["webhook-id"]
    assert refusal(http.post(f"{path}/whd_none/replay"))[0] == 404
    with pytest.raises(openai.NotFoundError):
        stranger.post(replay_path.removeprefix("/v1"), cast_to=object)
    with pytest.raises(openai.NotFoundError):
        stranger.get(path.removeprefix("/v1"), cast_to=object)

    disabled = client.webhooks.update(created.id, extra_body={"enabled": False}).to_dict()
    assert (disabled["enabled"], disabled["disabled_reason"]) == (False, "disabled by a request")
    assert refusal(http.post(replay_path))[:2] == (409, "invalid_state_transition")
    enabled = client.webhooks.update(created.id, extra_body={"enabled": True}).to_dict()
    assert (enabled["enabled"], enabled["disabled_reason"]) == (True, None)


def test_what_cannot_be_a_receiver_is_refused(
    client: openai.OpenAI, http: httpx.Client, service: Service
) -> None:
    good = {"event_types": ["batch.failed"], "name": "n", "url": URL}
    for change, param in (
        ({"url": "https://127.0.0.1/"}, "url"),
        ({"url": "https://[::ffff:10.0.0.1]/"}, "url"),
        ({"url": "https://2130706433/"}, "url"),
        ({"url": "http://example.com/"}, "url"),
        ({"url": "https://169.254.169.254/latest"}, "url"),
        ({"url": 7}, "url"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["response.completed"]}, "event_types"),
        ({"name": ""}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"secret": "whsec_x"}, "secret"),
    ):
        status, _, named = refusal(http.post("/v1/webhook_endpoints", json={**good, **change}))
        assert (status, (named or "").split("[")[0]) == (400, param), change
    created = client.webhooks.create(**good | {"url": "http://hooks.internal/x"})  # type: ignore[arg-type]
    path = f"/v1/webhook_endpoints/{created.id}"
    assert refusal(http.post(path, json={"url": "https://10.0.0.1/"}))[0] == 400
    assert client.webhooks.retrieve(created.id).url == "http://hooks.internal/x"

    with open_receiver(is_up=False) as down:
        client.webhooks.update(created.id, url=down.url)
        asked = {"event_type": "batch.failed"}
        status, code, named = refusal(http.post(f"{path}/test", json=asked))
        assert (status, code, named) == (400, "endpoint_unreachable", "url")

    reader = service.new_key(PROJECT, scopes=["jobs:read"])
    with service.http(reader) as reading:
        assert reading.get(path).status_code == 200
        assert reading.delete(path).status_code == 403
        assert reading.post("/v1/webhook_endpoints", json=good).status_code == 403


def test_a_retry_returns_the_endpoint_of_the_first_attempt_and_there_is_a_limit(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    path, body = "/v1/webhook_endpoints", {"event_types": TYPES, "name": "n", "url": URL}
    first = http.post(path, json=body).json()
    retried = http.post(path, json=body, headers={"x-stainless-retry-count": "1"})
    assert retried.json() == first
    assert retried.headers["idempotent-replayed"] == "true"
    keyed = [http.post(path, json=body, headers={"idempotency-key": "k"}) for _ in range(2)]
    assert keyed[0].json() == keyed[1].json()
    assert keyed[0].json()["id"] != first["id"]
    other = http.post(path, json={**body, "name": "m"}, headers={"idempotency-key": "k"})
    assert refusal(other)[0] == 422
    client.webhooks.delete(keyed[0].json()["id"])
    assert http.post(path, json=body, headers={"idempotency-key": "k"}).status_code == 404

    answers = [http.post(path, json=body) for _ in range(20)]
    assert [answer.status_code for answer in answers] == [200] * 19 + [429]
    assert refusal(answers[-1])[1] == "insufficient_quota"


def test_a_retry_of_a_rotation_returns_the_secret_of_the_first_attempt(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    path = (
        f"/v1/webhook_endpoints/{client.webhooks.create(event_types=TYPES, name='n', url=URL).id}"
    )

    def rotate(headers: dict[str, str], *, keeps_old: bool = True) -> httpx.Response:
        body = {"keep_old_secret_active_for_24_hours": keeps_old}
        return http.post(f"{path}/rotate_secret", json=body, headers=headers)

    for first, retry in (
        ({"idempotency-key": "k"}, {"idempotency-key": "k"}),
        ({}, {"x-stainless-retry-count": "1"}),
    ):
        rotated, again = rotate(first), rotate(retry)
        assert again.json() == rotated.json()
        assert again.headers["idempotent-replayed"] == "true"
    assert refusal(rotate({"idempotency-key": "k"}, keeps_old=False))[0] == 422
    secrets = [rotate({}).json()["signing_secret"] for _ in range(2)]
    assert len({*secrets, rotated.json()["signing_secret"]}) == 3
