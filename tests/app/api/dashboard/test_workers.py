"""GET /v1/workers: serve workers by their heartbeats, and running jobs by their leases."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
import redis

from app.contracts.control import ModelState, ServeWorkerStatus
from app.contracts.generation import ServingOptions, serving_key_of
from app.contracts.messages import serve_worker_key
from app.db.schema.tables import Job, Model
from app.db.session import transaction
from app.settings import Settings
from tests.app.api.conftest import PROJECT, Service
from tests.job_rows import add_job, claim
from tests.waiting import wait_for

READ_ONLY = ("models:read", "jobs:read")


@pytest.fixture(autouse=True)
def quick_heartbeats(settings_env: Callable[..., Settings]) -> None:
    settings_env(serve_heartbeat_seconds=0.05)


def beat(valkey_url: str, **changes: object) -> None:
    """Writes the heartbeat of a serve worker that has two models, one of an unknown key."""
    models = (
        ModelState(serving_key="models/tiny", state="resident", bytes=1000, is_pinned=True),
        ModelState(
            serving_key="models/secret", state="failed", bytes=7, error="models/secret broke"
        ),
    )
    status = ServeWorkerStatus.model_validate(
        {"worker_id": "w-1", "models": models, "num_running": 3, "num_waiting": 2}
        | {"max_running": 8, "beat_at": time.time() - 1.0}
        | changes
    )
    with redis.Redis.from_url(valkey_url) as client:
        client.set(serve_worker_key(status.worker_id), status.model_dump_json(by_alias=True), ex=60)


def workers(http: httpx.Client) -> list[dict[str, Any]]:  # Any: JSON
    answer = http.get("/v1/workers")
    assert answer.status_code == 200, answer.text
    serve_workers: list[dict[str, Any]] = answer.json()["serve_workers"]
    return serve_workers


def test_a_serve_worker_is_shown_with_its_models_and_load(
    valkey: str, http: httpx.Client, register: Callable[..., str]
) -> None:
    register("tiny")
    assert workers(http) == []
    beat(valkey)
    wait_for(lambda: workers(http), 10, "the heartbeat was not seen")
    (worker,) = workers(http)
    assert (worker["id"], worker["state"]) == ("w-1", "ready")
    assert (worker["num_running"], worker["num_waiting"], worker["max_running"]) == (3, 2, 8)
    assert worker["resident_bytes"] == 1000
    assert worker["heartbeat_age_seconds"] >= 1.0
    known, unknown = worker["models"]
    assert (known["model"], known["state"], known["is_pinned"]) == ("tiny", "resident", True)
    # Neither the name nor the error of a model that the key cannot see is shown.
    assert (unknown["model"], unknown["error"]) == (None, None)


def test_a_model_with_serving_options_is_shown_by_its_name(
    valkey: str, http: httpx.Client, register: Callable[..., str]
) -> None:
    options = ServingOptions(weights="int8")
    with transaction() as session:
        model = session.get_one(Model, register("tiny"))
        model.serving = options.model_dump(mode="json")
    key = serving_key_of("models/tiny", options)
    beat(valkey, models=(ModelState(serving_key=key, state="resident", bytes=1000),))
    wait_for(lambda: workers(http), 10, "the heartbeat was not seen")
    assert [model["model"] for model in workers(http)[0]["models"]] == ["tiny"]


@pytest.mark.parametrize(
    ("changes", "state"),
    [({"is_draining": True}, "draining"), ({"stalled_seconds": 16.0}, "stalled")],
)
def test_a_worker_that_takes_no_work_says_so(
    valkey: str, http: httpx.Client, changes: dict[str, object], state: str
) -> None:
    beat(valkey, **changes)
    wait_for(lambda: workers(http), 10, "the heartbeat was not seen")
    assert workers(http)[0]["state"] == state


def test_running_jobs_show_their_leases_to_their_owners_only(service: Service) -> None:
    add_job("ftjob-ours", project_id=PROJECT)
    add_job("ftjob-theirs", project_id="rival")
    add_job("ftjob-waiting", project_id=PROJECT)
    claim("train-1")
    claim("train-2")
    with service.http(service.new_key(scopes=READ_ONLY)) as tenant, service.http() as operator:
        shown = tenant.get("/v1/workers").json()
        assert [job["id"] for job in shown["running_jobs"]] == ["ftjob-ours"]
        assert shown["num_running_jobs"] == 2
        (job,) = shown["running_jobs"]
        assert job["worker"].startswith("train-1")
        assert 0 <= job["heartbeat_age_seconds"] < job["lease_seconds"]
        everything = operator.get("/v1/workers").json()["running_jobs"]
        assert [job["id"] for job in everything] == ["ftjob-ours", "ftjob-theirs"]


def test_keys_without_the_scope_for_jobs_see_no_jobs(service: Service) -> None:
    add_job("ftjob-ours", project_id=PROJECT)
    claim("train-1")
    with service.http(service.new_key(scopes=("models:read",))) as http:
        shown = http.get("/v1/workers").json()
    assert (shown["running_jobs"], shown["num_running_jobs"]) == ([], 1)


def test_a_job_is_late_ten_seconds_after_its_heartbeat_was_due(
    service: Service, http: httpx.Client
) -> None:
    ages = {"ftjob-a": 1, "ftjob-b": 15, "ftjob-c": 25}  # a heartbeat is due every 10 s
    for job_id in ages:
        add_job(job_id, project_id=PROJECT)
        claim("train-1")
    with transaction() as session:
        for job_id, seconds in ages.items():
            job = session.get_one(Job, job_id)
            assert job.last_heartbeat_at is not None
            job.last_heartbeat_at -= timedelta(seconds=seconds)
    jobs = http.get("/v1/workers").json()["running_jobs"]
    assert {job["id"]: job["is_late"] for job in jobs} == {
        "ftjob-a": False,
        "ftjob-b": False,
        "ftjob-c": True,
    }


def test_a_key_without_the_scope_is_refused(service: Service) -> None:
    with service.http(service.new_key(scopes=("jobs:read",))) as http:
        assert http.get("/v1/workers").status_code == 403
