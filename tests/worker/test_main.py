"""The worker process from its start to its end."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from app.local.embedded_servers import free_port
from app.routing.task_queue import notify_workers
from tests.serve_worker import ROOT
from tests.waiting import wait_for
from worker.main import choose_device


class Process:
    """`python -m worker.main …` with its log in a file."""

    def __init__(self, role: str, log_path: Path) -> None:
        self.log_path = log_path
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "worker.main", role]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def wait_for_log(self, text: str, seconds: float = 30) -> None:
        wait_for(
            lambda: text in self.log_path.read_text(), seconds, f"no {text!r} in {self.log_path}"
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait(10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_train_worker_handles_wake_up_messages_and_ends_on_a_signal(
    database: str, valkey: str, tmp_path: Path, started: list[Process], number: int
) -> None:
    worker = Process("train", tmp_path / "log")
    started.append(worker)
    worker.wait_for_log("worker_ready")
    with redis.Redis.from_url(valkey) as client:
        assert notify_workers()
        wait_for(
            lambda: not client.llen("stillhouse:train"), 10, "the wake-up message was not handled"
        )
    assert worker.stop(number) == 0
    assert "Traceback" not in worker.log_path.read_text()


def test_a_worker_that_waits_for_redis_ends_when_told(
    settings_env: "object", monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[Process]
) -> None:
    monkeypatch.setenv("STILLHOUSE_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    worker = Process("train", tmp_path / "log")
    started.append(worker)
    worker.wait_for_log("Cannot connect")
    assert worker.stop() == 0


def test_a_train_worker_never_pays_for_torch() -> None:
    code = "import sys, worker.main, worker.jobs.supervisor; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_an_unknown_role_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker.main", "cook"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"usage" in done.stderr


def test_the_engine_runs_on_a_card_where_there_is_one() -> None:
    assert choose_device("auto", has_cuda=True) == choose_device("cuda", has_cuda=True) == "cuda"
    assert choose_device("auto", has_cuda=False) == choose_device("cpu", has_cuda=True) == "cpu"
    with pytest.raises(SystemExit, match="STILLHOUSE_SERVE_DEVICE"):
        choose_device("cuda", has_cuda=False)


@pytest.mark.parametrize("role", ["train", "serve"])
def test_a_worker_that_is_given_a_device_that_is_not_there_says_so(
    monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    name = f"STILLHOUSE_{role.upper()}_CUDA_DEVICES"
    monkeypatch.setenv(name, "7000")
    command = [sys.executable, "-m", "worker.main", role]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert f"{name} is 7000" in done.stderr
