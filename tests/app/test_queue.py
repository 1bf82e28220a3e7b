"""What the producer puts into Valkey, and what it does when there is none."""

import base64
import json
import socket
import time
from collections.abc import Callable

import pytest
import redis

from app.contracts import ArtifactRef, GenerateRequest
from app.queue import NotSent, queue_key, ring, send_generate
from app.settings import Settings

SECRET = "a prompt that no log may show"


def request() -> GenerateRequest:
    weights = ArtifactRef(key="models/x", bytes=1)
    return GenerateRequest(
        id="r", reply_to="api", model="m", weights=weights, text=SECRET, deadline_at=time.time() + 60
    )


def test_a_doorbell_lands_in_the_train_queue(valkey: str) -> None:
    assert ring()
    with redis.Redis.from_url(valkey) as client:
        assert client.llen("stillhouse:train") == 1
        assert client.keys("*binding*") == []


def test_a_request_lands_in_its_workers_own_queue_with_its_prompt_in_the_body_only(valkey: str) -> None:
    send_generate("w1", request())
    with redis.Redis.from_url(valkey) as client:
        (raw,) = client.lrange(queue_key("w1"), 0, -1)
    message = json.loads(raw)
    (body,), _, _ = json.loads(base64.b64decode(message["body"]))
    assert GenerateRequest.model_validate(body).text == SECRET
    assert SECRET not in json.dumps(message["headers"])
    assert message["headers"]["expires"] is not None


def test_a_stale_connection_is_replaced_at_once(valkey: str) -> None:
    assert ring()
    with redis.Redis.from_url(valkey) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert ring()
        assert client.llen("stillhouse:train") == 2


@pytest.mark.parametrize("kind", ["refusing", "silent"])
def test_without_redis_a_doorbell_gives_up_quickly_and_a_request_says_so(
    settings_env: Callable[..., Settings], kind: str
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen(16)  # connects, then never answers
        settings_env(redis_url=f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        began = time.monotonic()
        assert not ring()
        assert time.monotonic() - began < 2.5
        with pytest.raises(NotSent):
            send_generate("w1", request())
