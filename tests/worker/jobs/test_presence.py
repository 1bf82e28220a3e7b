"""Heartbeats of a train worker."""

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from structlog.testing import capture_logs

from app.contracts.train_workers import MachineProfile, TrainWorkerStatus
from app.routing.train_workers import live_train_workers
from app.settings import Settings
from tests.waiting import wait_for
from worker.jobs import presence
from worker.jobs.presence import (
    Presence,
    load_profile,
    profile_path,
    save_profile,
    teacher_precisions,
)

PROFILE = MachineProfile(device="cpu", flops=1e9, has_bfloat16=False)


@pytest.fixture
def settings(
    valkey: str,
    settings_env: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Settings:
    """Settings with quick heartbeats, and a home folder in which no machine was measured."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return settings_env(heartbeat_seconds=0.05, num_threads=1)


def is_measured(path: Path) -> bool:
    """Whether the file has the profile of the tests, whatever the load was."""
    found = load_profile(path)
    return found is not None and found.model_copy(update={"load": 0.0}) == PROFILE


def test_a_worker_is_alive_until_it_ends(settings: Settings) -> None:
    with Presence("train-1", settings) as worker:
        wait_for(lambda: len(live_train_workers() or ()) == 1, 10, "no heartbeat arrives")
        (status,) = live_train_workers() or []
        assert (status.worker_id, status.job_id, status.profile) == ("train-1", None, None)
        assert status.num_devices is None  # a job may ask for any number on a CPU
        assert status.memory_bytes > 2**28
        worker.note_job("ftjob-1")
        wait_for(
            lambda: [s.job_id for s in live_train_workers() or ()] == ["ftjob-1"],
            10,
            "the job is not shown",
        )
    assert live_train_workers() == []


def test_the_devices_are_told_unless_a_setting_replaces_their_number(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "visible_devices", lambda: ("0", "2"))
    for num_processes, expected in ((0, 2), (1, None)):
        changed = settings.model_copy(update={"num_processes": num_processes})
        with Presence("train-1", changed):
            wait_for(lambda: bool(live_train_workers()), 10, "no heartbeat arrives")
            assert [status.num_devices for status in live_train_workers() or ()] == [expected]


def test_heartbeats_survive_an_outage(settings: Settings, valkey: str) -> None:
    with Presence("train-1", settings), redis.Redis.from_url(valkey) as client:
        wait_for(lambda: bool(live_train_workers()), 10, "no heartbeat arrives")
        client.client_kill_filter(skipme=True)
        client.flushall()
        wait_for(lambda: bool(live_train_workers()), 10, "the heartbeats have ended")


def test_an_idle_machine_is_measured_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(presence, "load_per_core", lambda: 0.25)
    path = profile_path(settings)
    with Presence("train-1", settings):
        wait_for(lambda: load_profile(path) is not None, 60, "the machine is not measured")
    measured = load_profile(path)
    assert measured is not None
    assert measured.flops > 1e8
    assert measured.load == 0.25
    with Presence("train-2", settings):
        wait_for(lambda: bool(live_train_workers()), 10, "no heartbeat arrives")
        assert [status.profile for status in live_train_workers() or ()] == [measured]


def test_a_busy_machine_is_measured_again_when_it_has_less_load(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, "-c", f"print({PROFILE.model_dump_json()!r})")
    monkeypatch.setattr(presence, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(presence, "MEASURE_COMMAND", command)
    path = profile_path(settings)
    save_profile(path, PROFILE.model_copy(update={"flops": 1e8, "load": 2.0}))
    load = [1.5]
    monkeypatch.setattr(presence, "load_per_core", lambda: load[0])
    with Presence("train-1", settings):
        wait_for(lambda: bool(live_train_workers()), 10, "no heartbeat arrives")
        for _ in range(5):
            assert [s.profile.flops for s in live_train_workers() or () if s.profile] == [1e8]
            time.sleep(0.1)
        for expected in (0.7, 0.2):  # 0.2 is not busy, so that is the last time
            load[0] = expected
            wait_for(
                lambda: (load_profile(path) or PROFILE).load == expected,  # noqa: B023
                60,
                "the machine is not measured again",
            )
        assert load_profile(path) == PROFILE.model_copy(update={"load": 0.2})
        load[0] = 0.0
        saved_at = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns == saved_at


def test_a_damaged_profile_counts_as_none(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    save_profile(path, PROFILE)
    assert load_profile(path) == PROFILE
    path.write_text("{")
    assert load_profile(path) is None


def test_a_heartbeat_of_an_older_version_is_read() -> None:
    older = {"worker_id": "w", "memory_bytes": 1, "free_disk_bytes": 2, "beat_at": 3.0}
    assert TrainWorkerStatus.model_validate_json(json.dumps(older)).memory_bytes == 1


@pytest.mark.parametrize(
    "command",
    [(sys.executable, "-c", "raise SystemExit(3)"), (sys.executable, "-c", "x" * 2**18)],
    ids=["fails", "cannot start"],
)
def test_a_measurement_that_failed_is_tried_again_later(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(presence, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(presence, "RETRY_SECONDS", 0.5)
    working = (sys.executable, "-c", f"print({PROFILE.model_dump_json()!r})")
    monkeypatch.setattr(presence, "MEASURE_COMMAND", command)
    with capture_logs() as logs, Presence("train-1", settings) as worker:
        wait_for(lambda: bool(logs), 60, "the failure is not logged")
        monkeypatch.setattr(presence, "MEASURE_COMMAND", working)
        worker.note_job("ftjob-1")
        worker.note_job(None)
        path = profile_path(settings)
        wait_for(lambda: is_measured(path), 60, "the machine is not measured")
    assert logs[0]["event"] == "machine_not_measured"


def test_another_node_or_gpu_has_another_profile(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [profile_path(settings), profile_path(settings)]
    monkeypatch.setattr(presence, "GPU_COMMAND", ("echo", "NVIDIA H100"))
    paths.append(profile_path(settings))
    monkeypatch.setattr(platform, "node", lambda: "another")
    paths.append(profile_path(settings))
    assert paths[0] == paths[1]
    assert len(set(paths)) == 3


def test_the_precisions_of_teachers_depend_on_the_package_and_the_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presence, "QUANTIZATION_PACKAGE", "not_installed_here")
    assert teacher_precisions() == ()
    monkeypatch.setattr(presence, "QUANTIZATION_PACKAGE", "torch")  # is installed
    assert teacher_precisions() == ("int8", "int4")
    monkeypatch.setattr(presence, "visible_devices", lambda: ("8.9", "8.0"))
    monkeypatch.setattr(presence, "CAPABILITY_COMMAND", ("echo",))
    assert teacher_precisions() == ("int8", "int4")  # those of the weaker GPU
    monkeypatch.setattr(presence, "visible_devices", lambda: ("8.9",))
    assert teacher_precisions() == ("int8", "int4", "fp8")
    monkeypatch.setattr(presence, "CAPABILITY_COMMAND", ("false",))
    assert teacher_precisions() is None
