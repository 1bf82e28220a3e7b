"""A finished job's files can be had through the API, and exactly those: no zombie and no crash adds one."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psycopg
import pytest
from fastapi.testclient import TestClient

from app.auth import create_key
from app.contracts.messages import ArtifactRef, ImportJob
from app.db import files, jobs, reconciliation
from app.db.leases import RetryPolicy
from app.db.schema.tables import File, Job, Metric
from app.db.session import transaction
from app.main import create_app
from app.services.files import delete_file
from app.services.garbage_collector import DAY_SECONDS, collect
from app.settings import Settings, get_settings
from app.storage import StorageError, store
from tests.job_rows import FACTS, add_job, claim, ref
from tests.worker.jobs.test_lease_client import wake
from worker.jobs import lease_client
from worker.jobs.attempt import Attempt
from worker.jobs.lease_client import Lease, LeaseLost
from worker.jobs.lease_heartbeat import LeaseHeartbeat
from worker.jobs.result_files import metrics_csv, upload_results
from worker.protocol.run_lines import MetricsLine, ResultLine

LINE = ResultLine(
    folder="student",
    facts=FACTS.model_dump(),
    result={"kl": 0.5},
    trained_tokens=7,
    files=("f16.gguf",),
)


@pytest.fixture(autouse=True)
def settings(database: str, valkey: str, settings_env: Callable[..., Settings]) -> Settings:
    return settings_env(
        database_url=database, retry_backoff_seconds=0, key_pepper="pepper", keep_checkpoints=2
    )


def attempt_of(lease: Lease) -> Attempt:
    """An attempt whose run has just left a student and an export of some megabytes."""
    lease_heartbeat = LeaseHeartbeat(lease, beat_seconds=60)
    attempt = Attempt(lease, lease_heartbeat, lambda: False, get_settings())
    (attempt.out / "student").mkdir(parents=True)
    (attempt.out / "student" / "model.safetensors").write_bytes(b"weights")
    (attempt.out / "f16.gguf").write_bytes(os.urandom(3_000_000))
    return attempt


def finish(lease: Lease) -> Attempt:
    attempt = attempt_of(lease)
    attempt._finish(LINE)
    return attempt


def rows() -> list[File]:
    with transaction() as session:
        return files.page_files(session, "p", order="asc")[0]


def load() -> Job:
    with transaction() as session:
        job = jobs.load_job(session, "ftjob-1")
        assert job is not None
        return job


def record(lease: Lease, step: int, **values: float) -> None:
    lease_client.record(lease, step + 1, [MetricsLine(step=step, values=values)])


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with transaction() as session:
        key = create_key(session, "p")
    with TestClient(create_app(get_settings())) as http:
        yield openai.OpenAI(
            base_url=f"{http.base_url}/v1", api_key=key, http_client=http, max_retries=0
        )


def test_a_finished_job_lists_files_that_can_be_downloaded_and_deleted(
    client: openai.OpenAI,
) -> None:
    add_job()
    lease = claim()
    record(lease, 1, train_loss=2.5)
    attempt = finish(lease)
    listed = client.fine_tuning.jobs.retrieve("ftjob-1").result_files
    found = [client.files.retrieve(file_id) for file_id in listed]
    assert [(file.filename, file.purpose) for file in found] == [
        ("step_metrics.csv", "fine-tune-results"),
        ("metrics.csv", "fine-tune-results"),
        ("f16.gguf", "fine-tune-results"),
    ]
    for file in found:
        content = (attempt.out / file.filename).read_bytes()
        assert client.files.content(file.id).read() == content
        assert file.bytes == len(content)
    assert {file.id for file in client.files.list(purpose="fine-tune-results")} == set(listed)
    assert client.files.delete(listed[2]).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(listed[2])
    lines = client.files.content(listed[0]).read().decode().splitlines()
    assert lines == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,2.5,,,",
    ]
    assert collect(store()) == 0


def test_the_table_has_the_steps_of_all_attempts_once() -> None:
    add_job()
    first = claim()
    record(first, 1, train_loss=3.0, train_agreement=0.25)
    record(first, 2, train_loss=2.0, valid_loss=2.5)
    lease_client.lost(first, "It was killed.")
    wake()
    second = claim()
    record(second, 2, train_loss=2.0)
    record(second, 3, train_loss=1.0, learning_rate=0.125)
    table = list(csv.reader((finish(second).out / "metrics.csv").read_text().splitlines()))
    names = ["train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert table == [
        ["step", *names, "learning_rate", "train_agreement"],
        ["1", "3.0", "0.25", "", "", "", "0.25"],
        ["2", "2.0", "", "2.5", "", "", ""],
        ["3", "1.0", "", "", "", "0.125", ""],
    ]
    names_by_id = {row.id: row.filename for row in rows()}
    assert len(names_by_id) == 3
    assert [names_by_id[file_id] for file_id in load().result_file_ids] == [
        "step_metrics.csv",
        "metrics.csv",
        "f16.gguf",
    ]


def test_a_series_of_accuracy_goes_before_that_of_agreement() -> None:
    points = [
        Metric(job_id="j", name=name, step=1, value=v)
        for name, v in (("train_accuracy", 0.5), ("train_agreement", 0.25))
    ]
    assert metrics_csv(points).splitlines()[1] == "1,,0.5,,,0.25"


def test_a_job_without_metrics_has_a_table_without_lines() -> None:
    assert (
        metrics_csv([]) == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
    )


def test_a_zombie_adds_no_file_to_its_successors_job() -> None:
    add_job()
    zombie = claim("zombie")
    late = attempt_of(zombie)
    lease_client.lost(zombie, "It fell silent.")
    wake()
    successor = claim("successor")
    with pytest.raises(LeaseLost):
        late._finish(LINE)
    assert rows() == []
    late.clean_up()
    finish(successor)
    mine = load().result_file_ids
    with pytest.raises(LeaseLost):
        attempt_of(zombie)._finish(LINE)
    assert (load().result_file_ids, {row.id for row in rows()}) == (mine, set(mine))


def test_a_job_cancelled_at_the_last_moment_leaves_no_file_in_the_store() -> None:
    add_job()
    lease = claim()
    with transaction() as session:
        jobs.request_cancel(session, lease.job_id)
    finish(lease)
    assert load().status == "cancelled"
    assert (rows(), store().children("files"), load().result_file_ids) == ([], [], [])


def test_an_answer_that_got_lost_makes_no_second_files() -> None:
    add_job()
    lease = claim()
    attempt = attempt_of(lease)
    uploaded = upload_results(attempt.out, LINE.files, [])
    given: dict[str, Any] = {
        "model_id": "ds:small",
        "ref": ref("models/m"),
        "facts": FACTS,
        "result": {},
    }
    for _ in range(2):
        assert lease_client.finish(lease, **given, trained_tokens=7, files=uploaded)
    assert len(rows()) == 3


def test_only_files_of_the_runs_folder_are_published(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "secret")
    for name in ("../secret", "link", "missing", "."):
        with pytest.raises(StorageError, match="not a file in its folder"):
            upload_results(tmp_path / "out", [name], [])


KILLED_AT_THE_COMMIT = """
import os, signal, sys
from tests.worker.jobs.test_result_files import attempt_of, LINE
from worker.jobs import lease_client
lease = lease_client.claim("doomed")
lease_client.finish = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
attempt_of(lease)._finish(LINE)
"""


def test_a_kill_between_upload_and_commit_leaves_only_garbage(
    settings: Settings, database: str
) -> None:
    add_job()
    doomed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_THE_COMMIT], cwd=Path(__file__).parents[3], check=False
    )
    assert doomed.returncode == -signal.SIGKILL
    orphans = store().children("files")
    assert len(orphans) == 3
    assert (rows(), load().status) == ([], "running")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE jobs SET lease_expires_at = now() - interval '1 second'")
    with transaction() as session:
        assert (
            reconciliation.expire_leases(session, RetryPolicy(max_losses=3, backoff_seconds=0)) == 1
        )
    wake()
    finish(claim("successor"))
    for name in orphans:  # a day later
        path = Path(settings.store_root()) / "files" / name
        os.utime(path, (0, path.stat().st_mtime - 2 * DAY_SECONDS))
    assert collect(store()) == 4  # all of them, and the model that nobody registered
    assert sorted(store().children("files")) == sorted(load().result_file_ids)
    for row in rows():
        assert store().exists(row.store_key)
        delete_file("p", row.id)
    assert store().children("files") == []


def test_a_shared_import_leaves_no_files() -> None:
    staged = ImportJob(
        output_model="ds:small", staged=ArtifactRef(key="imports/1", bytes=1), format="folder"
    )
    add_job(kind="import", project_id=None, spec=staged.model_dump(mode="json"))
    finish(claim())
    assert (load().status, load().result_file_ids, store().children("files")) == (
        "succeeded",
        [],
        [],
    )
