"""Turns of an engine and of training runs on the same cores; the runs are real processes."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from tests.waiting import wait_for
from worker import core_sharing
from worker.core_sharing import (
    Announcement,
    CoreTurns,
    SharedRun,
    announce,
    find_runs,
    is_stopped,
    shared_cores,
)
from worker.jobs.run_process import RunProcess

BUSY = "while True: pass"


@pytest.fixture
def run() -> Iterator[subprocess.Popen[bytes]]:
    """A process group that computes."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True)
    yield process
    process.kill()
    process.wait()


class Schedule:
    """A clock that advances when somebody computes or sleeps, and what the runs had of the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.is_stopped = False
        self.training_seconds = 0.0
        self.waits: list[float] = []

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.training_seconds += 0.0 if self.is_stopped else seconds

    def sleep(self, seconds: float) -> None:
        assert not self.is_stopped, "the engine waits while nobody computes"
        self.waits.append(seconds)
        self.advance(seconds)

    def send(self, pid: int, number: signal.Signals) -> None:
        self.is_stopped = number == signal.SIGSTOP

    def turns(self, folder: Path, share: float) -> CoreTurns:
        return CoreTurns(folder, share, clock=lambda: self.now, sleep=self.sleep, send=self.send)


def test_an_announced_run_is_found_until_it_ends(
    tmp_path: Path, run: subprocess.Popen[bytes]
) -> None:
    announce(tmp_path, run.pid)
    assert find_runs(tmp_path) == [run.pid]
    run.kill()
    run.wait()
    assert find_runs(tmp_path) == []
    assert list(tmp_path.glob("*.json")) == []


def test_a_later_process_with_the_same_pid_is_no_run(
    tmp_path: Path, run: subprocess.Popen[bytes]
) -> None:
    path = announce(tmp_path, run.pid)
    assert path is not None
    announced = Announcement.model_validate_json(path.read_bytes())
    path.write_text(
        announced.model_copy(update={"start_ticks": announced.start_ticks - 1}).model_dump_json()
    )
    assert find_runs(tmp_path) == []


def test_an_unreadable_announcement_is_passed_over(
    tmp_path: Path, run: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "1.json").write_text("{")
    announce(tmp_path, run.pid)
    assert find_runs(tmp_path) == [run.pid]


@pytest.mark.parametrize("step_seconds", [0.003, 0.04, 0.13, 0.25])
def test_a_busy_engine_leaves_runs_their_share(
    tmp_path: Path, run: subprocess.Popen[bytes], step_seconds: float
) -> None:
    announce(tmp_path, run.pid)
    schedule = Schedule()
    turns = schedule.turns(tmp_path, 0.4)
    while schedule.now < 30:
        turns.take()
        assert schedule.is_stopped
        schedule.advance(step_seconds)
    assert schedule.training_seconds / schedule.now == pytest.approx(0.4, abs=0.02)
    assert max(schedule.waits) <= core_sharing.LONGEST_TRAINING_TURN_SECONDS


def test_a_long_step_is_paid_for_in_the_next_training_turns(
    tmp_path: Path, run: subprocess.Popen[bytes]
) -> None:
    """A prefill takes longer than a training turn may make up for."""
    announce(tmp_path, run.pid)
    schedule = Schedule()
    turns = schedule.turns(tmp_path, 0.4)
    for number in range(2000):
        turns.take()
        schedule.advance(0.4 if number % 50 == 0 else 0.02)
    assert schedule.training_seconds / schedule.now == pytest.approx(0.4, abs=0.02)


def test_runs_are_not_stopped_while_the_engine_is_idle(
    tmp_path: Path, run: subprocess.Popen[bytes]
) -> None:
    announce(tmp_path, run.pid)
    schedule = Schedule()
    turns = schedule.turns(tmp_path, 0.4)
    for _ in range(10):
        turns.take()
        schedule.advance(0.05)
        turns.release()
        assert not schedule.is_stopped
        schedule.advance(1.0)  # idle
    assert schedule.waits == []  # what the runs had meanwhile is more than their share


def test_an_engine_without_runs_never_waits(tmp_path: Path) -> None:
    schedule = Schedule()
    turns = schedule.turns(tmp_path, 0.4)
    for _ in range(100):
        turns.take()
        schedule.advance(0.05)
    assert schedule.waits == []


def test_a_second_engine_respects_the_turn_that_the_first_has_given(
    tmp_path: Path, run: subprocess.Popen[bytes]
) -> None:
    announce(tmp_path, run.pid)
    first, second = Schedule(), Schedule()
    turns = first.turns(tmp_path, 0.4)
    turns.take()
    first.advance(core_sharing.SERVING_TURN_SECONDS)
    turns.take()  # gives the runs their turn, and waits for it
    second.now = first.now - first.waits[0] / 2  # in the middle of that turn
    second.turns(tmp_path, 0.4).take()
    assert second.waits == [pytest.approx(first.waits[0] / 2)]


def test_the_end_of_a_turn_from_before_a_reboot_delays_no_engine(
    tmp_path: Path, run: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "training_turn").write_bytes(core_sharing.DOUBLE.pack(1e6))
    announce(tmp_path, run.pid)
    schedule = Schedule()
    turns = schedule.turns(tmp_path, 0.4)
    for _ in range(5):
        turns.take()
        schedule.advance(0.01)
    assert schedule.waits == []


def test_a_run_that_is_asked_to_stop_computes_all_the_time(tmp_path: Path) -> None:
    process = RunProcess(
        ["http.server", "0"], tmp_path, {"PATH": ""}, shared_cores=tmp_path / "cores"
    )
    process.ask_to_stop()
    assert find_runs(tmp_path / "cores") == []
    process.kill()


def test_a_share_of_nothing_stops_runs_while_the_engine_is_busy(
    tmp_path: Path, run: subprocess.Popen[bytes]
) -> None:
    announce(tmp_path, run.pid)
    schedule = Schedule()
    turns = schedule.turns(tmp_path, 0.0)
    for _ in range(100):
        turns.take()
        schedule.advance(0.05)
    assert schedule.training_seconds == 0


def test_real_runs_are_stopped_and_resumed(tmp_path: Path, run: subprocess.Popen[bytes]) -> None:
    announce(tmp_path, run.pid)
    turns = CoreTurns(tmp_path, 0.4)
    turns.take()
    wait_for(lambda: is_stopped(run.pid), 5, "the run was not stopped")
    turns.release()
    wait_for(lambda: not is_stopped(run.pid), 5, "the run was not resumed")


def test_a_run_that_stays_stopped_is_resumed(tmp_path: Path, run: subprocess.Popen[bytes]) -> None:
    """As after kill -9 of a serve worker in its turn."""
    shared = SharedRun(tmp_path, run.pid)
    run.send_signal(signal.SIGSTOP)
    wait_for(lambda: is_stopped(run.pid), 5, "the run was not stopped")
    wait_for(lambda: not is_stopped(run.pid), 20, "the run was not resumed")
    shared.close()


def test_a_run_process_is_announced_until_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "cores"
    process = RunProcess(["http.server", "0"], tmp_path, {"PATH": ""}, shared_cores=folder)
    assert find_runs(folder) == [process.pid]
    process.kill()
    assert list(folder.glob("*.json")) == []


def test_nobody_takes_turns_where_the_setting_says_so_or_a_gpu_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shared_cores(Settings(work_dir=str(tmp_path))) == tmp_path / "shared_cores"
    assert shared_cores(Settings(work_dir=str(tmp_path), training_cpu_share=1.0)) is None
    card = tmp_path / "card"
    monkeypatch.setattr(core_sharing, "GPU_DEVICES", (str(card),))
    card.touch()
    assert shared_cores(Settings(work_dir=str(tmp_path))) is None


def test_a_stopped_run_still_obeys_a_kill(tmp_path: Path) -> None:
    process = RunProcess(
        ["http.server", "0"], tmp_path, {"PATH": ""}, shared_cores=tmp_path / "cores"
    )
    turns = CoreTurns(tmp_path / "cores", 0.0)
    turns.take()
    wait_for(lambda: is_stopped(process.pid), 5, "the run was not stopped")
    process.kill()  # returns when the process is gone
    assert find_runs(tmp_path / "cores") == []
