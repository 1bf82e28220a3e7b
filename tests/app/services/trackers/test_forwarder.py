"""Metrics of jobs in a real Postgres, sent to files, an HTTP server and the real wandb library."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import text

from app.contracts.messages import JobFailure, JobStatus
from app.contracts.trackers import TrackerName
from app.db import jobs, leases
from app.db.job_states import move
from app.db.session import engine, transaction
from app.db.trackers import runs
from app.services.trackers.forwarder import Forwarder
from app.services.trackers.mlflow_runs import MlflowRuns
from app.services.trackers.tensorboard_files import TensorboardFiles
from app.services.trackers.wandb_runs import WandbRuns
from app.settings import Settings, get_settings
from tests.app.services.trackers.mlflow_server import MlflowServer
from tests.job_rows import add_job, claim
from tests.serve_worker import ROOT
from worker.jobs.lease_client import Lease

Json = dict[str, Any]  # Any: JSON of the trackers
JOB = "ftjob-1"
RESULT = {"student": {"accuracy": 0.75, "is_good": True}, "samples": [{"score": 1}], "name": "x"}
FORWARD_ONCE = """
from app import crash_points
from app.services.trackers.forwarder import forwarder_threads
from app.settings import get_settings
crash_points.arm(get_settings().crash_dir)
thread, = [t for t in forwarder_threads(get_settings()) if t.name == "tracker-tensorboard"]
thread._forwarder.step()
"""


@pytest.fixture(autouse=True)
def in_database(database: str) -> str:
    return database


@pytest.fixture
def mlflow() -> Iterator[MlflowServer]:
    server = MlflowServer()
    yield server
    server.close()


def begin(*integrations: Json) -> Lease:
    """Adds a job with integrations, and claims it."""
    add_job(JOB, request={"model": "big", "integrations": list(integrations)})
    return claim()


def train(steps: range, name: str = "train_loss") -> None:
    with transaction() as session:
        for step in steps:
            leases.write_metrics(session, JOB, step, {name: 10.0 - step})


def succeed(lease: Lease) -> None:
    with transaction() as session:
        ended: Json = {"result": RESULT, "result_model_id": "ds:small"}
        assert move(session, JOB, JobStatus.succeeded, message="done", token=lease.token, **ended)


def fail(lease: Lease) -> None:
    with transaction() as session:
        assert leases.fail(session, JOB, lease.token, JobFailure(code="nan_loss", message="no"))


def add_checkpoint() -> None:
    """Inserts a checkpoint, so that the job can be resumed after a failure."""
    insert = "INSERT INTO checkpoints (id, job_id, lease_token, step, store_key, bytes, manifest_sha256) VALUES ('c', :job, 1, 1, 'k', 1, '')"
    with transaction() as session:
        session.execute(text(insert), {"job": JOB})


def forward(forwarder: Forwarder) -> int:
    """Sends all that is due, and makes every run due before. Returns the number of batches."""
    with engine().begin() as connection:
        connection.execute(text("UPDATE tracker_runs SET due_at = now()"))
    count = 0
    while forwarder.step():
        count += 1
    return count


def tensorboard() -> Forwarder:
    return Forwarder("tensorboard", TensorboardFiles(get_settings().tensorboard_root()).deliver)


def read_events() -> list[tuple[int, str, float]]:
    """Returns step, tag and value of all scalars, as TensorBoard's own reader finds them."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (path,) = (get_settings().tensorboard_root() / JOB).iterdir()
    return [
        (event.step, value.tag, value.simple_value)
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def warnings() -> list[str]:
    with transaction() as session:
        events = jobs.events_since(session, JOB, 0)
    return [event.message for event in events if event.level == "warn"]


def is_closed(tracker: TrackerName) -> bool:
    query = text("SELECT closed_at IS NOT NULL FROM tracker_runs WHERE type = :type")
    with engine().connect() as connection:
        return bool(connection.execute(query, {"type": tracker}).scalar_one())


def test_tensorboard_reads_each_point_and_the_result_once() -> None:
    lease = begin({"type": "tensorboard", "tensorboard": {}})
    forwarder = tensorboard()
    assert forward(forwarder) == 0, "there is nothing to send yet"
    train(range(1, 4))
    assert forward(forwarder) == 1
    train(range(4, 1503))
    train(range(2, 3), "valid_loss")
    succeed(lease)
    assert forward(forwarder) == 3, "two batches and the end"
    expected = [(step, "train_loss", 10.0 - step) for step in range(1, 1503)]
    expected += [(2, "valid_loss", 8.0), (1502, "result/student/accuracy", 0.75)]
    assert sorted(read_events()) == sorted(expected)
    assert is_closed("tensorboard")
    assert forward(forwarder) == 0


def test_a_kill_between_sending_and_recording_loses_and_repeats_nothing(
    settings_env: Callable[..., Settings], tmp_path: Path
) -> None:
    settings_env(crash_dir=tmp_path)
    lease = begin({"type": "tensorboard", "tensorboard": {}})
    train(range(1, 4))
    (tmp_path / "tracker.sent").touch()
    killed = subprocess.run([sys.executable, "-c", FORWARD_ONCE], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(read_events()) == 3
    train(range(4, 7))
    train(range(1, 7), "lr")
    succeed(lease)
    assert forward(tensorboard()) == 3, "the batch again, the new points and the end"
    points = [event for event in read_events() if event[1] != "result/student/accuracy"]
    assert sorted(points) == [
        (step, name, 10.0 - step) for step in range(1, 7) for name in ("lr", "train_loss")
    ]


def test_mlflow_gets_parameters_metrics_and_the_end(mlflow: MlflowServer) -> None:
    options = {"experiment": "titles", "run_name": "first", "tags": {"team": "a"}}
    lease = begin({"type": "mlflow", "mlflow": options})
    forwarder = Forwarder("mlflow", MlflowRuns(mlflow.url).deliver)
    train(range(1, 3))
    forward(forwarder)
    succeed(lease)
    forward(forwarder)
    (run,) = mlflow.runs.values()
    assert (run["info"]["run_name"], run["info"]["status"]) == ("first", "FINISHED")
    assert run["tags"] == {
        "team": "a",
        "stillhouse.job_id": JOB,
        "stillhouse.status": "succeeded",
        "stillhouse.model": "ds:small",
    }
    assert run["params"]["teacher"] == "big"
    metrics = [(metric["key"], metric["step"], metric["value"]) for metric in run["metrics"]]
    assert metrics == [
        ("train_loss", 1, 9.0),
        ("train_loss", 2, 8.0),
        ("result/student/accuracy", 2, 0.75),
    ]


def test_a_tracker_that_is_down_costs_one_warning_and_no_point(mlflow: MlflowServer) -> None:
    begin({"type": "mlflow", "mlflow": {"experiment": "titles"}})
    forwarder = Forwarder("mlflow", MlflowRuns(mlflow.url).deliver)
    mlflow.is_down = True
    with structlog.testing.capture_logs() as logged:
        for step in range(1, 4):
            train(range(step, step + 1))
            assert forward(forwarder) == 1, "a failed batch must wait before it is sent again"
    assert [event["event"] for event in logged] == ["tracker_down"]
    mlflow.is_down = False
    forward(forwarder)
    (run,) = mlflow.runs.values()
    assert [metric["step"] for metric in run["metrics"]] == [1]
    forward(forwarder)
    assert [metric["step"] for metric in run["metrics"]] == [1, 2, 3]
    (warning,) = warnings()
    assert "mlflow did not accept" in warning
    assert "maintenance" in warning


def test_a_run_is_given_up_a_week_after_its_job(mlflow: MlflowServer) -> None:
    lease = begin({"type": "mlflow", "mlflow": {"experiment": "titles"}})
    succeed(lease)
    mlflow.is_down = True
    forwarder = Forwarder("mlflow", MlflowRuns(mlflow.url).deliver)
    forward(forwarder)
    assert not is_closed("mlflow")
    with engine().begin() as connection:
        connection.execute(text("UPDATE jobs SET finished_at = now() - interval '8 days'"))
    forward(forwarder)
    assert is_closed("mlflow")
    assert "for a week" in warnings()[1]


def test_a_process_that_was_too_slow_does_not_move_the_position() -> None:
    begin({"type": "tensorboard", "tensorboard": {}})
    train(range(1, 3))
    claims = []
    for _ in range(2):
        with transaction() as session:
            claims.append(runs.claim(session, "tensorboard", 5.0))
        with engine().begin() as connection:
            connection.execute(text("UPDATE tracker_runs SET due_at = now()"))
    slow, current = claims
    assert slow is not None
    assert current is not None
    assert slow.points == current.points
    with transaction() as session:
        runs.finish_batch(session, slow, {"bytes": 1}, 0)
        runs.postpone_batch(session, slow, "slow")
    with transaction() as session:
        again = runs.claim(session, "tensorboard", 5.0)
    assert again is not None
    assert (again.points, again.run.state, again.run.num_failures) == (slow.points, {}, 0)


def test_a_repeated_mlflow_batch_finds_its_run(mlflow: MlflowServer) -> None:
    begin({"type": "mlflow", "mlflow": {"experiment": "titles"}})
    forwarder = Forwarder("mlflow", MlflowRuns(mlflow.url).deliver)
    train(range(1, 3))
    forward(forwarder)
    with engine().begin() as connection:  # as after a kill that came before the commit
        lost = "UPDATE tracker_runs SET state = '{}', sent = '{}', sending = '{\"train_loss\": 2}'"
        connection.execute(text(lost))
    forward(forwarder)
    assert mlflow.num_batches == 2
    (run,) = mlflow.runs.values()
    assert [metric["step"] for metric in run["metrics"]] == [1, 2]


def test_a_failed_job_that_is_resumed_continues_its_run(mlflow: MlflowServer) -> None:
    lease = begin({"type": "mlflow", "mlflow": {"experiment": "titles"}})
    forwarder = Forwarder("mlflow", MlflowRuns(mlflow.url).deliver)
    train(range(1, 2))
    add_checkpoint()
    fail(lease)
    forward(forwarder)
    (run,) = mlflow.runs.values()
    assert run["info"]["status"] == "FAILED"
    with transaction() as session:
        assert jobs.resume(session, JOB) is not None
    lease = claim()
    train(range(2, 3))
    forward(forwarder)
    assert run["info"]["status"] == "RUNNING"
    succeed(lease)
    forward(forwarder)
    assert run["info"]["status"] == "FINISHED"
    assert [metric["step"] for metric in run["metrics"]] == [1, 2, 2]


def test_the_end_of_an_earlier_attempt_does_not_close_the_run() -> None:
    lease = begin({"type": "tensorboard", "tensorboard": {}})
    add_checkpoint()
    fail(lease)
    with transaction() as session:
        ending = runs.claim(session, "tensorboard", 5.0)
    assert ending is not None
    assert ending.is_end
    with transaction() as session:
        assert jobs.resume(session, JOB) is not None
    fail(claim())  # the job has the same status again, with another end
    with transaction() as session:
        runs.finish_batch(session, ending, {}, 0)
    assert not is_closed("tensorboard")
    forward(tensorboard())
    assert is_closed("tensorboard")


def test_a_folder_that_cannot_be_created_postpones_the_batch(
    settings_env: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_env(wandb_api_key="k" * 40, wandb_mode="offline")
    (tmp_path / "file").touch()
    runs_below_a_file = WandbRuns(settings.model_copy(update={"data_dir": tmp_path / "file"}))
    begin({"type": "wandb", "wandb": {"project": "p"}})
    train(range(1, 2))
    assert forward(Forwarder("wandb", runs_below_a_file.deliver)) == 1
    (warning,) = warnings()
    assert "the files of the run cannot be written" in warning


def test_wandb_writes_each_point_in_offline_mode(
    settings_env: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    settings = settings_env(wandb_api_key="k" * 40, wandb_mode="offline")
    lease = begin({"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}})
    forwarder = Forwarder("wandb", WandbRuns(settings).deliver)
    train(range(1, 2))
    assert forward(forwarder) == 1
    train(range(2, 3))
    train(range(2, 3), "valid_loss")
    succeed(lease)
    assert forward(forwarder) == 2
    assert warnings() == []
    records = [
        record for path in sorted(settings.data_dir.rglob("*.wandb")) for record in read_wandb(path)
    ]
    headers = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in headers} == {(JOB, "p", JOB)}
    rows = [
        {item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    numbers = [record.history.step.num for record in records if record.HasField("history")]
    assert numbers == [0, 1], "the second batch must continue the numbers of the first"
    names = ("step", "train_loss", "valid_loss")
    points = [{name: row[name] for name in names if name in row} for row in rows]
    assert points == [
        {"step": 1.0, "train_loss": 9.0},
        {"step": 2.0, "train_loss": 8.0, "valid_loss": 8.0},
    ]
    assert is_closed("wandb")


def read_wandb(path: Path) -> Iterator[Any]:  # Any: wandb's records have no types
    """Reads a file of wandb: a header of 7 bytes, then records in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32_768 - at % 32_768 < 7:  # the rest of a block is too short for a header
            at += 32_768 - at % 32_768
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def test_an_error_of_wandb_is_reported_without_the_key(
    settings_env: Callable[..., Settings],
) -> None:
    settings = settings_env(wandb_api_key="secret-key", wandb_base_url="nonsense")
    begin({"type": "wandb", "wandb": {"project": "p"}})
    train(range(1, 2))
    assert forward(Forwarder("wandb", WandbRuns(settings).deliver)) == 1
    (warning,) = warnings()
    assert "nonsense" in warning
    assert "secret-key" not in warning
