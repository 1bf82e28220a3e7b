"""What the producer puts into Valkey, and what it does when there is none."""

import asyncio
import base64
import json
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from celery import Celery

from app.contracts.generation import GenerateRequest
from app.contracts.messages import GENERATE_TASK, ArtifactRef
from app.routing import task_queue
from app.routing.task_queue import NotSent, Outbox, notify_workers, notify_workers_again, queue_key
from app.routing.train_workers import live_train_workers
from app.settings import Settings, celery_settings

SECRET = "a prompt that no log may show"


def request() -> GenerateRequest:
    weights = ArtifactRef(key="models/x", bytes=1)
    return GenerateRequest(
        id="r",
        reply_to="api",
        model="m",
        weights=weights,
        text=SECRET,
        deadline_at=time.time() + 60,
    )


def test_a_doorbell_lands_in_the_train_queue(valkey: str) -> None:
    assert notify_workers()
    with redis.Redis.from_url(valkey) as client:
        assert client.llen("stillhouse:train") == 1
        assert client.keys("*binding*") == []


def test_bells_that_nobody_answers_do_not_pile_up(
    valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_queue, "MAX_WAITING_MESSAGES", 3)
    with redis.Redis.from_url(valkey) as client:
        for _ in range(5):
            notify_workers_again()
        assert client.llen("stillhouse:train") == 3
        assert client.keys("*binding*") == []
        client.lpop("stillhouse:train")
        notify_workers_again()
        assert client.llen("stillhouse:train") == 3


def test_without_a_redis_url_no_message_is_sent_and_no_worker_is_known(
    settings_env: Callable[..., Settings],
) -> None:
    settings_env(redis_url="")
    assert not notify_workers()
    notify_workers_again()
    assert live_train_workers() is None


def send_generate(redis_url: str) -> None:
    async def send() -> None:
        outbox = Outbox(redis_url)
        try:
            await outbox.send("w1", request())
        finally:
            await outbox.aclose()

    asyncio.run(send())


def without_ids(raw: bytes) -> dict[str, Any]:  # Any: as JSON has it
    """A message less what is new in each; the headers' origin names the process and its thread."""
    message: dict[str, Any] = json.loads(raw)
    for new in ("id", "root_id", "expires", "origin"):
        message["headers"].pop(new)
    for new in ("correlation_id", "delivery_tag"):
        message["properties"].pop(new)
    for unread in (
        "reply_to",
        "argsrepr",
        "kwargsrepr",
        "expiration",
    ):  # the headers have what is read
        message["properties"].pop(unread, None)
    message["body"] = json.loads(base64.b64decode(message["body"]))
    message["body"][0][0].pop("deadline_at")
    return message


def test_a_request_is_the_message_that_celery_itself_would_send(valkey: str) -> None:
    send_generate(valkey)
    slow = Celery("slow", set_as_current=False)
    slow.conf.update(celery_settings(Settings(redis_url=valkey)))
    with redis.Redis.from_url(valkey) as client:
        (ours,) = client.lrange(queue_key("w1"), 0, -1)
        client.delete(queue_key("w1"))
        body = request().model_dump(mode="json", exclude_defaults=True)
        soon = datetime.now(UTC) + timedelta(minutes=1)
        options: dict[str, Any] = {
            "queue": "serve.w1",
            "declare": [],
            "argsrepr": "()",
            "kwargsrepr": "{}",
        }
        slow.send_task(GENERATE_TASK, args=(body,), expires=soon, **options)
        (celerys,) = client.lrange(queue_key("w1"), 0, -1)
    assert without_ids(ours) == without_ids(celerys)


def test_a_request_lands_in_its_workers_own_queue_with_its_prompt_in_the_body_only(
    valkey: str,
) -> None:
    send_generate(valkey)
    with redis.Redis.from_url(valkey) as client:
        (raw,) = client.lrange(queue_key("w1"), 0, -1)
    message = json.loads(raw)
    (body,), _, _ = json.loads(base64.b64decode(message["body"]))
    assert GenerateRequest.model_validate(body).text == SECRET
    assert SECRET not in json.dumps(message["headers"])
    assert message["headers"]["expires"] is not None


def test_a_stale_connection_is_replaced_at_once(valkey: str) -> None:
    assert notify_workers()
    with redis.Redis.from_url(valkey) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert notify_workers()
        assert client.llen("stillhouse:train") == 2


def test_a_request_goes_out_though_its_connection_went_stale(valkey: str) -> None:
    async def send_twice() -> None:
        outbox = Outbox(valkey)
        try:
            await outbox.send("w1", request())
            with redis.Redis.from_url(valkey) as client:
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await outbox.send("w1", request())
        finally:
            await outbox.aclose()

    asyncio.run(send_twice())
    with redis.Redis.from_url(valkey) as client:
        assert client.llen(queue_key("w1")) == 2


@pytest.mark.parametrize("kind", ["refusing", "silent"])
def test_without_redis_a_doorbell_gives_up_quickly_and_a_request_says_so(
    settings_env: Callable[..., Settings], kind: str
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen(16)  # connects, then never answers
        settings = settings_env(redis_url=f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        began = time.monotonic()
        assert not notify_workers()
        assert time.monotonic() - began < 20
        with pytest.raises(NotSent):
            send_generate(settings.redis_url)
