import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import redis
from sqlalchemy import event

from app.api import health
from app.contracts.control import ServeWorkerStatus
from app.contracts.messages import serve_worker_key
from app.db.session import engine
from tests.app.api.conftest import Service
from tests.waiting import wait_for


def test_without_a_serve_worker_the_service_is_degraded_but_ready(http: httpx.Client) -> None:
    assert http.get("/health/live").json() == {"status": "alive"}
    answer = http.get("/health/ready")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "degraded",
        "database": True,
        "serve_workers": 0,
        "stalled_serve_workers": 0,
        "last_forward_seconds": None,
        "dropped_completions": 0,
    }


def test_readiness_costs_strangers_no_query_on_jobs_and_few_on_the_database(
    service: Service,
) -> None:
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:  # Any: SQLAlchemy's
        if threading.current_thread().name != "reconciler":
            statements.append(statement)

    began = time.monotonic()
    event.listen(engine(), "before_cursor_execute", note)
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=service.url) as stranger:
        answers = list(pool.map(lambda _: stranger.get("/health/ready").status_code, range(200)))
    event.remove(engine(), "before_cursor_execute", note)
    assert set(answers) == {200}
    assert [statement for statement in statements if "job" in statement] == []
    assert (
        1 <= statements.count("SELECT 1") <= 1 + (time.monotonic() - began) / health.CHECK_SECONDS
    )


def test_a_worker_that_computes_nothing_of_what_it_has_does_not_count(
    http: httpx.Client, valkey: str
) -> None:
    now = time.time()
    stuck = ServeWorkerStatus(
        worker_id="stuck",
        max_running=8,
        num_running=1,
        beat_at=now,
        last_step_at=now - 60,
        stalled_seconds=60,
    )
    with redis.Redis.from_url(valkey) as client:
        client.set(serve_worker_key("stuck"), stuck.model_dump_json())
    wait_for(
        lambda: http.get("/health/ready").json()["serve_workers"] == 1, 5, "nobody sees the worker"
    )
    found = http.get("/health/ready").json()
    assert (found["status"], found["stalled_serve_workers"]) == ("degraded", 1)
    assert found["last_forward_seconds"] == 60


def test_a_heartbeat_of_an_older_worker_counts(http: httpx.Client, valkey: str) -> None:
    beat = {"worker_id": "old", "max_running": 8, "beat_at": time.time()}
    with redis.Redis.from_url(valkey) as client:
        client.set(serve_worker_key("old"), json.dumps(beat))
    wait_for(lambda: http.get("/health/ready").json()["serve_workers"] == 1, 5, "it is not seen")
    assert "stillhouse_serve_workers 1.0" in http.get("/metrics").text


def test_metrics_speak_prometheus_and_only_to_an_operator(
    service: Any, http: httpx.Client
) -> None:  # Any: conftest's
    http.get("/v1/files/file-unknown")
    text = http.get("/metrics").text
    assert 'stillhouse_jobs{status="queued"} 0.0' in text
    assert 'route="/v1/files/{file_id}",status="404"' in text
    assert "file-unknown" not in text
    with service.http(service.new_key(scopes=["jobs:read"])) as narrow:
        assert narrow.get("/metrics").status_code == 403
