"""Runs that a fork server starts, against what a new process does."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_for
from worker.jobs import run_starter
from worker.jobs.run_starter import ForkedRun, StartedRun, close_starters, start_run

OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    close_starters()


def start(folder: Path, *arguments: str, extra: Mapping[str, str] = OFFLINE) -> StartedRun:
    with (folder / "stderr").open("wb") as errors:
        return start_run(("worker.train", *arguments), {**os.environ, **extra}, errors)


def start_waiting(folder: Path) -> StartedRun:
    """A run that waits for its spec, which is a pipe that nobody writes to."""
    os.mkfifo(folder / "spec")
    return start(folder, str(folder / "spec"), "--out", str(folder))


def printed(run: StartedRun) -> bytes:
    assert run.stdout is not None
    with run.stdout:
        return run.stdout.read()


def server_of(run: StartedRun) -> psutil.Process:
    parent = psutil.Process(run.pid).parent()
    assert parent is not None
    return parent


def test_output_errors_and_status_are_those_of_a_new_process(tmp_path: Path) -> None:
    for arguments, status in ((["--help"], 0), ([], 2), (["missing", "--out", str(tmp_path)], 1)):
        found = []
        for extra in (OFFLINE, {"HF_HUB_OFFLINE": "0"}):
            run = start(tmp_path, *arguments, extra=extra)
            output, code = printed(run), run.wait()
            lines = (tmp_path / "stderr").read_bytes().splitlines()
            # torchao, if it is installed, warns when it is imported
            lines = [line for line in lines if b"torchao" not in line and b"_pytree" not in line]
            found.append((output, code, lines[-1:]))
        assert isinstance(run, ForkedRun) is False
        assert found[0] == found[1]
        assert found[0][1] == status


def test_a_run_has_its_environment_title_and_session(tmp_path: Path) -> None:
    run = start_waiting(tmp_path)
    process = psutil.Process(run.pid)
    wait_for(lambda: process.cmdline()[1:4] == ["-m", "worker.train", str(tmp_path / "spec")])
    assert os.getsid(run.pid) == run.pid
    assert run.poll() is None
    held = {os.readlink(f"/proc/{run.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{run.pid}/fd")}
    assert not [name for name in held if name.startswith(("socket:", "anon_inode:"))]
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert run.poll() == -signal.SIGKILL
    printed(run)
    wait_for(lambda: not psutil.pid_exists(run.pid))


def test_a_run_dies_with_its_server_and_the_next_gets_another(tmp_path: Path) -> None:
    run = start_waiting(tmp_path)
    first = server_of(run)
    first.kill()
    assert run.wait() == -signal.SIGKILL
    printed(run)
    (tmp_path / "spec").unlink()
    after = start_waiting(tmp_path)
    assert isinstance(after, ForkedRun)
    assert server_of(after).pid != first.pid
    os.killpg(after.pid, signal.SIGKILL)
    assert after.wait() == -signal.SIGKILL
    printed(after)


def test_a_server_ends_with_its_client(tmp_path: Path) -> None:
    run = start_waiting(tmp_path)
    ended = server_of(run)
    close_starters()
    assert not ended.is_running()
    assert run.wait() == -signal.SIGKILL
    printed(run)


def test_the_modules_of_the_runs_can_be_imported_before_a_fork() -> None:
    """CUDA cannot be used in a fork of a process that has initialised it, nor can threads go on."""
    script = (
        "import threading, torch\n"
        "def refuse(*_): raise AssertionError('CUDA is initialised at import')\n"
        "for name in ('init', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "if hasattr(torch._C, '_cuda_getDeviceCount'): torch._C._cuda_getDeviceCount = refuse\n"
        f"import {', '.join(run_starter.FORKED_MODULES)}\n"
        "print(threading.active_count())"
    )
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, env=environment
    )
    assert (found.stdout.strip(), found.returncode) == (b"1", 0), found.stderr.decode()
