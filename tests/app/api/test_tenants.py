"""Whose name a request carries to the serve worker, which divides its room among tenants.

No real serve worker may run beside this test, as it would take some of the requests. So the test has a file, and
with it a Valkey, to itself.
"""

import base64
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import openai
import redis

from app.contracts.control import ServeWorkerStatus
from app.contracts.generation import GenerateRequest
from app.contracts.messages import serve_worker_key
from app.routing.task_queue import queue_key
from app.settings import Settings
from tests.app.api.conftest import PROJECT, Service, jsonl
from tests.waiting import wait_for


def test_all_batches_of_a_project_are_one_tenant_and_each_of_its_keys_is_another(
    settings_env: Callable[..., Settings],
    service: Service,
    register: Callable[..., str],
    valkey: str,
) -> None:
    settings_env(serve_heartbeat_seconds=0.2)
    register()
    tenants: set[str] = set()
    has_seen_all = threading.Event()

    def take_requests(redis_client: "redis.Redis") -> bool:
        heartbeat = ServeWorkerStatus(worker_id="w1", max_running=4, beat_at=time.time())
        redis_client.set(serve_worker_key("w1"), heartbeat.model_dump_json())
        while raw := redis_client.rpop(queue_key("w1")):
            assert isinstance(raw, bytes)
            (body,), _, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
            tenants.add(GenerateRequest.model_validate(body).tenant)
        return len(tenants) == 3

    def ask(client: openai.OpenAI) -> None:
        while not has_seen_all.is_set():  # the API does not know the worker at once
            with suppress(openai.OpenAIError):
                client.with_options(timeout=1).completions.create(model="tiny", prompt="x")

    def submit_batch(client: openai.OpenAI) -> str:
        body = {"model": "tiny", "prompt": "What is rain?", "max_tokens": 8}
        request = {"custom_id": "q", "method": "POST", "url": "/v1/completions", "body": body}
        file = client.files.create(file=("requests.jsonl", jsonl([request])), purpose="batch")
        return client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        ).id

    with (
        service.client() as one,
        service.client() as other,
        redis.Redis.from_url(valkey) as redis_client,
    ):
        batch_ids = [submit_batch(client) for client in (one, other)]
        with ThreadPoolExecutor(2) as pool:
            pool.map(ask, (one, other))
            try:
                wait_for(lambda: take_requests(redis_client), 60, "not all requests came")
            finally:
                has_seen_all.set()
        for batch_id in batch_ids:
            one.batches.cancel(batch_id)
    assert PROJECT in tenants
