"""Data sets over real HTTP, and the jobs that make them in a real supervisor."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.db import jobs, leases, models, reconciliation
from app.db.schema.tables import File, Job
from app.db.session import transaction
from app.settings import Settings, get_settings
from app.storage import store
from tests.app.api.conftest import Service
from tests.serve_worker import ROOT
from tests.stored_rows import BEGUN_AT, insert, record
from tests.waiting import wait_for
from worker.jobs.supervisor import run_until_idle

Json = dict[str, Any]  # Any: JSON
URL = "/v1/datasets"
ENDED = ("succeeded", "failed")
MAX_LOSSES = 20  # a busy machine may cost the replacement a lease, which is no failure
NUMBERS = [number * 7919 % 99_991 for number in range(60)]


@pytest.fixture
def traffic(service: Service) -> None:
    """60 completions of two models, with metadata."""
    insert(
        [
            record(
                n, question=f"Fact {NUMBERS[n]} of {NUMBERS[-n]}?", answer=f"It is {NUMBERS[n]}.",
                model=f"m{n % 2}", metadata={"task": str(n % 3)},
            )
            for n in range(60)
        ]
    )  # fmt: skip


def run_all() -> None:
    run_until_idle("test", lambda: False)


def job_of(dataset_id: str) -> Job:
    with transaction() as session:
        job = jobs.load_job(session, dataset_id)
    assert job is not None
    return job


def messages_of(dataset_id: str) -> str:
    with transaction() as session:
        return "\n".join(e.message for e in jobs.events_since(session, dataset_id, 0))


def rows_of(http: httpx.Client, file_id: str) -> list[Json]:
    return [json.loads(line) for line in http.get(f"/v1/files/{file_id}/content").text.splitlines()]


def test_a_filter_becomes_files_that_a_job_can_take(
    traffic: None, http: httpx.Client, client: openai.OpenAI
) -> None:
    body = {
        "name": "support",
        "filter": {"model": "m1", "metadata": {"task": "0"}, "created_after": int(BEGUN_AT) + 6},
        "limit": 8,
        "validation_fraction": 0.3,
        "metadata": {"team": "x"},
    }
    dataset = http.post(URL, json=body).json()
    assert (dataset["object"], dataset["status"], dataset["training_file"]) == (
        "dataset",
        "queued",
        None,
    )
    run_all()
    dataset = http.get(f"{URL}/{dataset['id']}").json()
    assert dataset["status"] == "succeeded", dataset
    assert (dataset["name"], dataset["metadata"]) == ("support", {"team": "x"})
    assert dataset["request"]["filter"]["model"] == "m1"
    report = dataset["report"]
    assert report["num_completions"] == 8
    assert report["models"] == {"m1": report["num_rows"]}
    files = {s: dataset[f"{s}_file"] for s in ("training", "validation", "test")}
    rows = {side: rows_of(http, file_id) for side, file_id in files.items() if file_id}
    assert sum(map(len, rows.values())) == report["num_rows"]
    training = client.files.retrieve(files["training"])
    assert (training.purpose, training.filename) == ("fine-tune", "support-training.jsonl")
    with transaction() as session:
        row = session.get(File, training.id)
        assert row is not None
        assert (row.format, row.num_rows) == ("chat", len(rows["training"]))
    newest = [n for n in range(60) if n % 2 == 1 and n % 3 == 0 and n >= 6][-8:]
    answers = {row["messages"][-1]["content"] for side in rows.values() for row in side}
    assert answers <= {f"It is {NUMBERS[n]}." for n in newest}
    stages = [stage["name"] for stage in dataset["stages"]]
    assert stages == ["reading", "deduplicating", "writing"]
    events = http.get(f"{URL}/{dataset['id']}/events").json()["data"]
    assert events[0]["message"] == "The data set is complete."


def test_lists_and_projects_are_separate(
    traffic: None, http: httpx.Client, service: Service
) -> None:
    ids = [
        http.post(URL, json={"name": f"d{n}", "metadata": {"n": str(n)}}).json()["id"]
        for n in (1, 2)
    ]
    assert [row["id"] for row in http.get(URL).json()["data"]] == ids[::-1]
    assert [row["id"] for row in http.get(f"{URL}?metadata[n]=1").json()["data"]] == ids[:1]
    refused = http.get(f"{URL}?name=d1")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "name")
    assert http.get("/v1/fine_tuning/jobs").json()["data"] == []
    with service.http(service.new_key("rival")) as stranger:
        assert stranger.get(URL).json()["data"] == []
        for answer in (
            stranger.get(f"{URL}/{ids[0]}"),
            stranger.delete(f"{URL}/{ids[0]}"),
            stranger.post(f"{URL}/{ids[0]}/cancel"),
        ):
            assert answer.status_code == 404
        assert stranger.post(URL, json={}).json()["error"]["code"] == "no_matching_completions"


def test_a_retry_returns_the_same_data_set(traffic: None, http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "one"}
    first = http.post(URL, json={}, headers=headers)
    again = http.post(URL, json={}, headers=headers)
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    third = http.post(URL, json={}, headers={"x-stainless-retry-count": "0"}).json()
    retried = http.post(URL, json={}, headers={"x-stainless-retry-count": "1"}).json()
    assert retried["id"] == third["id"] != first.json()["id"]


def test_the_name_of_a_data_set_is_free_for_a_model(traffic: None, http: httpx.Client) -> None:
    assert http.post(URL, json={"name": "support"}).status_code == 200
    with transaction() as session:
        assert not models.is_name_taken(session, "support")


def test_a_waiting_data_set_is_cancelled_at_once(traffic: None, http: httpx.Client) -> None:
    dataset = http.post(URL, json={}).json()
    refused = http.delete(f"{URL}/{dataset['id']}")
    assert (refused.status_code, refused.json()["error"]["type"]) == (409, "conflict_error")
    assert http.post(f"{URL}/{dataset['id']}/cancel").json()["status"] == "cancelled"
    assert http.delete(f"{URL}/{dataset['id']}").json()["deleted"] is True
    assert http.get(f"{URL}/{dataset['id']}").status_code == 404


def test_deleting_a_data_set_deletes_its_files(traffic: None, http: httpx.Client) -> None:
    dataset = http.post(URL, json={}).json()
    run_all()
    dataset = http.get(f"{URL}/{dataset['id']}").json()
    files = [dataset[f"{side}_file"] for side in ("training", "validation", "test")]
    assert all(files)
    assert http.delete(f"/v1/files/{files[2]}").status_code == 200
    assert http.delete(f"{URL}/{dataset['id']}").json() == {
        "id": dataset["id"], "object": "dataset", "deleted": True,
    }  # fmt: skip
    assert http.get("/v1/files").json()["data"] == []
    assert not any(store().exists(f"files/{file_id}") for file_id in files)
    assert len(http.get("/v1/chat/completions?limit=100").json()["data"]) == 60


def test_a_data_set_without_training_rows_fails_with_the_reasons(
    service: Service, http: httpx.Client
) -> None:
    insert([record(n, finish_reason="length") for n in range(3)])
    dataset = http.post(URL, json={}).json()
    run_all()
    dataset = http.get(f"{URL}/{dataset['id']}").json()
    assert (dataset["status"], dataset["error"]["code"]) == ("failed", "empty_dataset")
    assert "3 finish_reason" in dataset["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 100_001}, "limit"),
        ({"name": "a/b"}, "name"),
        ({"mask": ["name"]}, "mask"),
        ({"mask": ["email", "email"]}, "mask"),
        ({"finish_reasons": []}, "finish_reasons"),
        ({"near_duplicates": 0.2}, "near_duplicates"),
        ({"test_fraction": 0.6}, "test_fraction"),
        ({"filter": {"model": ""}}, "filter.model"),
        ({"filter": {"metadata": {"k": 1}}}, "filter.metadata"),
        ({"filter": {"created_after": 9, "created_before": 9}}, "filter.created_before"),
        ({"filter": {"created_after": 2**33}}, "filter"),
        ({"filter": {"project": "x"}}, "filter.project"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_request_that_cannot_succeed_is_refused_at_once(
    traffic: None, http: httpx.Client, changes: Json, param: str
) -> None:
    answer = http.post(URL, json=changes)
    assert answer.status_code == 400
    assert str(answer.json()["error"]["param"]).startswith(param), answer.text


@pytest.mark.parametrize(
    "point",
    ["claim.committed", "inputs.prepared", "dataset.stored", "dataset.inside", "dataset.finished"],
)
def test_a_worker_that_is_killed_anywhere_makes_one_data_set(
    traffic: None,
    http: httpx.Client,
    settings_env: Callable[..., Settings],
    tmp_path: Path,
    point: str,
) -> None:
    crash_dir = tmp_path / "crash"
    crash_dir.mkdir()
    settings_env(
        crash_dir=crash_dir, lease_seconds=4, heartbeat_seconds=0.2, reconcile_seconds=0.2,
        retry_backoff_seconds=0, ring_again_seconds=0.5, key_pepper="pepper",
    )  # fmt: skip
    (crash_dir / point).touch()
    dataset = http.post(URL, json={}).json()
    killed = start_train_worker(tmp_path)
    assert killed.wait(60) == -9
    replacement = start_train_worker(tmp_path)
    try:
        wait_for(lambda: reconciled(dataset["id"]) in ENDED, 60, "the job has not ended")
        assert job_of(dataset["id"]).status == "succeeded", messages_of(dataset["id"])
    finally:
        replacement.terminate()
        replacement.wait(30)
    done = http.get(f"{URL}/{dataset['id']}").json()
    files = {row["id"] for row in http.get("/v1/files").json()["data"]}
    assert files == {done[f"{side}_file"] for side in ("training", "validation", "test")}
    assert done["report"]["num_completions"] == 60


def start_train_worker(folder: Path) -> Any:  # Any: a Popen
    with (folder / "train.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "worker.main", "train"],
            cwd=ROOT,
            env=dict(os.environ),
            stdout=log,
            stderr=log,
        )


def reconciled(dataset_id: str) -> str:
    """The status of the job, after expired leases have been ended as the reconciler does it."""
    with transaction() as session:
        reconciliation.expire_leases(session, leases.RetryPolicy(MAX_LOSSES, 0))
        reconciliation.wake(session)
    return job_of(dataset_id).status


def test_a_drain_returns_the_job_to_the_queue_and_the_next_worker_makes_it(
    traffic: None, http: httpx.Client
) -> None:
    dataset = http.post(URL, json={}).json()
    drain = threading.Event()

    def should_drain() -> bool:  # from the moment when the job runs
        if job_of(dataset["id"]).status == "running":
            drain.set()
        return drain.is_set()

    run_until_idle("test", should_drain)
    assert job_of(dataset["id"]).status == "queued", messages_of(dataset["id"])
    assert "The worker was shut down." in messages_of(dataset["id"])
    run_all()
    assert job_of(dataset["id"]).status == "succeeded", messages_of(dataset["id"])
    assert not any((get_settings().work_root() / dataset["id"]).glob("*"))
