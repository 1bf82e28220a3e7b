"""A run's process: its lines arrive, its whole group dies, and why it died is told. The runs here are small programs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

from app.contracts.messages import ArtifactRef, ImportJob
from app.settings import Settings
from tests.waiting import wait_for
from worker.jobs.run_process import RunProcess, child_environment, num_oom_kills
from worker.protocol.run_lines import MessageLine, RunLine

Start = Callable[[str], RunProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a program as a run."""
    started: list[RunProcess] = []

    def start(program: str) -> RunProcess:
        (tmp_path / "program.py").write_text(dedent(program))
        process = RunProcess(
            ["program"], tmp_path, dict(os.environ) | {"PYTHONPATH": str(tmp_path)}
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def standstill(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While one thread computes no other gets a turn, as when the worker stands still; and the pipe has less time."""
    monkeypatch.setattr("worker.jobs.run_process.PIPE_SECONDS", 0.5)
    seconds = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(seconds)


def lines_until_over(process: RunProcess) -> list[RunLine]:
    lines: list[RunLine] = []
    deadline = time.monotonic() + 80
    while not process.is_over:
        assert time.monotonic() < deadline
        lines += process.take_lines(0.05)
    return lines


def test_lines_arrive_in_order_and_what_is_no_line_is_passed_over(start: Start) -> None:
    process = start(
        """
        print('{"type":"message","message":"one"}')
        print("a library says hello")
        print('{"type":"unknown"}')
        print('{"type":"message","message":"two"}')
        """
    )
    assert lines_until_over(process) == [MessageLine(message="one"), MessageLine(message="two")]


def test_more_lines_than_anybody_waits_for_all_arrive(start: Start) -> None:
    process = start('for i in range(5000): print(\'{"type":"message","message":"%d"}\' % i)')
    time.sleep(1)
    messages = [line.message for line in lines_until_over(process) if isinstance(line, MessageLine)]
    assert messages == [str(i) for i in range(5000)]


@pytest.mark.usefixtures("standstill")
def test_a_worker_that_stood_still_misses_no_line(start: Start) -> None:
    process = start('print(\'{"type":"message","message":"the last"}\')')
    stands_until = time.monotonic() + 3
    while time.monotonic() < stands_until:  # the run ends meanwhile, and nobody reads
        pass
    assert lines_until_over(process) == [MessageLine(message="the last")]


@pytest.mark.usefixtures("standstill")
def test_lines_that_waited_for_room_are_not_lost(start: Start) -> None:
    process = start('for i in range(1500): print(\'{"type":"message","message":"%d"}\' % i)')
    for _ in range(2):  # the run ends, which is seen, and more wait than there is room for
        time.sleep(1.5)
        assert not process.is_over
    assert len(lines_until_over(process)) == 1500


@pytest.mark.parametrize(
    ("program", "sentence", "code"),
    [
        ("import sys; sys.exit(3)", "status 3", "worker_lost"),
        ("pass", "status 0", "worker_lost"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV", "worker_lost"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL", "worker_lost"),
        ("x = bytearray(2**62)", "memory", "out_of_memory"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29)); x = bytearray(2**30)",
            "memory",
            "out_of_memory",
        ),
    ],
)
def test_a_death_is_told_apart(start: Start, program: str, sentence: str, code: str) -> None:
    process = start(program)
    lines_until_over(process)
    told, told_code = process.describe_death()
    assert sentence in told
    assert told_code == code


def test_the_kernels_count_can_be_read() -> None:
    assert num_oom_kills() >= 0


def test_killing_takes_the_children_along(start: Start) -> None:
    process = start(
        """
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print('{"type":"message","message":"started"}', flush=True)
        time.sleep(600)
        """
    )
    wait_for(lambda: bool(process.take_lines(0.1)))
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.kill()
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in family))


def test_a_run_that_ignores_the_polite_signal_is_killed(start: Start) -> None:
    process = start(
        """
        import signal, time
        signal.signal(signal.SIGTERM, lambda *_: print('{"type":"message","message":"no"}', flush=True))
        print('{"type":"message","message":"ready"}', flush=True)
        while True: time.sleep(0.1)
        """
    )
    wait_for(lambda: bool(process.take_lines(0.1)))
    process.ask_to_stop()
    wait_for(lambda: process.take_lines(0.1) == [MessageLine(message="no")])
    assert not process.is_over
    process.kill()
    assert process.is_over


def test_a_grandchild_that_keeps_the_pipe_does_not_keep_the_run_alive(start: Start) -> None:
    process = start(
        """
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        time.sleep(1)  # so that it is seen as ours before we end
        """
    )
    (child,) = wait_for_children(process)
    try:
        wait_for(lambda: process.take_lines(0.05) == [] and process.is_over)
    finally:
        child.kill()


def wait_for_children(process: RunProcess) -> list[psutil.Process]:
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = [p for p in psutil.process_iter(["ppid"]) if p.info["ppid"] == process.pid]
        return bool(found)

    wait_for(look)
    return found


def test_a_run_dies_with_its_supervisor_however_that_dies(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time; time.sleep(600)")
    supervisor = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time; from pathlib import Path; from worker.jobs.run_process import RunProcess;"
            f"run = RunProcess(['program'], Path({str(tmp_path)!r}), dict(os.environ));"
            "print(run.pid, flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ) | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"},
    )
    assert supervisor.stdout is not None
    with supervisor.stdout:
        run = psutil.Process(int(supervisor.stdout.readline()))
        wait_for(lambda: "program" in run.cmdline() and "app.parent_death" not in run.cmdline())
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()
    wait_for(lambda: not run.is_running() or run.status() == "zombie")


def test_threads_of_a_run_spin_briefly_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = ImportJob(output_model="m", staged=ArtifactRef(key="k", bytes=1), format="folder")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    environment = child_environment(job, Settings())
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert 0 < int(environment["GOMP_SPINCOUNT"]) < 100_000
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert child_environment(job, Settings())["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environment = child_environment(job, Settings())
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in environment


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT"])
def test_a_run_that_died_of_a_full_disk_is_told_from_a_lost_one(start: Start, number: str) -> None:
    process = start(f"import errno, os; raise OSError(errno.{number}, os.strerror(errno.{number}))")
    lines_until_over(process)
    assert process.describe_death()[1] == "disk_full"
