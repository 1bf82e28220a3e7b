"""Kept processes come back, drain politely and never outlive their keeper."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from app.local.process_manager import Kept, stop_all
from tests.waiting import wait_for

SLEEP = "import time; time.sleep(600)"
POLITE = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True);"
    "time.sleep(600)"
)
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[[str], Kept]]:
    made: list[Kept] = []

    def keep(program: str) -> Kept:
        kept = Kept(f"program-{len(made)}", [sys.executable, "-c", program], tmp_path)
        made.append(kept)
        kept.start()
        return kept

    yield keep
    for kept in made:
        kept.kill()


def keep_until(kept: Kept, say: Callable[[str], None], is_true: Callable[[], bool]) -> None:
    def turn() -> bool:
        kept.keep(say)
        return is_true()

    wait_for(turn)


def test_a_process_that_dies_is_told_with_its_log_and_started_again(
    keep: Callable[[str], Kept],
) -> None:
    kept = keep("print('last words'); raise SystemExit(3)")
    kept._wait_seconds = 0.1
    said: list[str] = []
    keep_until(kept, said.append, lambda: len(said) >= 3)
    assert "status 3" in said[0]
    assert "last words" in said[0]
    assert "is being restarted" in said[1]


def test_each_start_waits_longer_than_the_one_before(keep: Callable[[str], Kept]) -> None:
    kept = keep("raise SystemExit(1)")
    kept._wait_seconds = 0.05
    starts: list[float] = []

    def note(text: str) -> None:
        if "is being restarted" in text:
            starts.append(time.monotonic())

    keep_until(kept, note, lambda: len(starts) >= 4)
    waits = [after - before for before, after in itertools.pairwise(starts)]
    assert all(wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True))


def test_polite_processes_end_by_themselves_and_stubborn_ones_are_killed(
    keep: Callable[[str], Kept],
) -> None:
    polite, stubborn = keep(POLITE), keep(STUBBORN)
    wait_for(lambda: "up" in polite.log_tail() and "up" in stubborn.log_tail())
    assert stop_all([polite, stubborn], grace_seconds=1, is_urgent=lambda: False) == [stubborn.name]
    assert not polite.is_running
    assert not stubborn.is_running


def test_a_second_signal_does_not_wait(keep: Callable[[str], Kept]) -> None:
    stubborn = keep(STUBBORN)
    wait_for(lambda: "up" in stubborn.log_tail())
    began = time.monotonic()
    stop_all([stubborn], grace_seconds=60, is_urgent=lambda: True)
    assert time.monotonic() - began < 30


def test_a_killed_keeper_leaves_nobody_behind(tmp_path: Path) -> None:
    keeper = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from app.local.process_manager import Kept;"
            f"kept = Kept('one', [sys.executable, '-c', {SLEEP!r}], Path({str(tmp_path)!r}));"
            "kept.start(); print('up', flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        env=dict(os.environ) | {"PYTHONPATH": os.getcwd()},
    )
    assert keeper.stdout is not None
    with keeper.stdout:
        assert keeper.stdout.readline() == b"up\n"
        (child,) = psutil.Process(keeper.pid).children()
        wait_for(lambda: "app.parent_death" not in child.cmdline())
        keeper.send_signal(signal.SIGKILL)
        keeper.wait()
    wait_for(lambda: not child.is_running() or child.status() == "zombie")


def test_a_kept_process_has_its_own_environment_on_top_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "kept")
    program = "import os; print(os.environ['OURS'], os.environ['OWN'])"
    kept = Kept("program", [sys.executable, "-c", program], tmp_path, environment={"OWN": "added"})
    kept.start()
    wait_for(lambda: not kept.is_running)
    assert kept.log_tail() == "kept added"
