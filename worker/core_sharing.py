"""Turn-taking between a serve worker and the training runs on the same cores (gang scheduling).

A trainer and an engine both compute on all cores, and every parallel region ends in a barrier. When both run at once,
threads wait at barriers for threads that are not scheduled, and most of the machine is lost. So they take turns: while
the engine has work it stops the process groups of the runs (SIGSTOP), and after each of its turns it lets them
compute (SIGCONT) for their share of the time. A run is never stopped while the engine is idle.

The number of threads of either side never changes, so answers and checkpoints do not depend on who else is at work.
Runs announce themselves by a file each in a folder of the machine's work folder. The train worker resumes a run that
stays stopped, which happens if a serve worker is killed in its turn.
"""

import contextlib
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ValidationError

from app.settings import Settings

SERVING_TURN_SECONDS: Final = 0.15  # minimum serving time between two training turns
LONGEST_TRAINING_TURN_SECONDS: Final = (
    0.2  # bounds the wait of a prompt that arrives in a training turn
)
RESCAN_SECONDS: Final = 0.1
GUARD_SECONDS: Final = 0.2
DOUBLE: Final = struct.Struct("=d")
GPU_DEVICES: Final = ("/dev/nvidiactl", "/dev/kfd")
NUM_STOPPED_CHECKS: Final = 10  # a run that is found stopped so many times in a row is resumed


class Announcement(BaseModel):
    """A run that shares the cores. The start time distinguishes it from a later process with the same pid."""

    pid: int
    start_ticks: int
    boot_id: str


def announce(folder: Path, pid: int) -> Path | None:
    """Writes the announcement of the process group `pid` and returns its path; None if the process is gone."""
    start_ticks = _start_ticks(pid)
    if start_ticks is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{pid}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(
        Announcement(pid=pid, start_ticks=start_ticks, boot_id=_boot_id()).model_dump_json()
    )
    partial.replace(path)
    return path


def find_runs(folder: Path) -> list[int]:
    """Returns the process groups that are announced and alive, and removes the files of those that are not."""
    pids = []
    for path in folder.glob("*.json"):
        try:
            run = Announcement.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        if run.boot_id == _boot_id() and _start_ticks(run.pid) == run.start_ticks:
            pids.append(run.pid)
        elif run.boot_id != _boot_id() or _start_ticks(run.pid) is None:
            with contextlib.suppress(
                OSError
            ):  # a file of another user is removed by its own worker
                path.unlink()
    return pids


class CoreTurns:
    """Turn-taking of an engine: call `take` before each step and `release` when idle. Not thread-safe.

    `training_share` is the share of the time that runs get while the engine is busy, from 0 to below 1.
    """

    def __init__(
        self,
        folder: Path,
        training_share: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        send: Callable[[int, signal.Signals], None] | None = None,
    ) -> None:
        self._folder = folder
        self._training_turn = _SharedTime(folder / "training_turn")
        # Seconds of training per second of serving.
        self._ratio = training_share / (1 - training_share)
        self._clock, self._sleep, self._send = clock, sleep, send or signal_group
        self._runs: list[int] = []
        self._scanned_at = -RESCAN_SECONDS
        self._used_seconds = 0.0  # by the engine since the runs' last turn
        self._taken_at: float | None = None
        self._released_at = 0.0

    def take(self) -> None:
        """Blocks until the engine may compute, then stops the runs. A training turn that is due takes place first."""
        now = self._clock()
        if now - self._scanned_at >= RESCAN_SECONDS:
            self._runs, self._scanned_at = find_runs(self._folder), now
        if not self._runs:
            self._used_seconds, self._taken_at = 0.0, None
            return
        self._count(now)
        if self._used_seconds >= SERVING_TURN_SECONDS and self._ratio:
            seconds = min(self._used_seconds * self._ratio, LONGEST_TRAINING_TURN_SECONDS)
            self._training_turn.write(self._clock() + seconds)
            self._signal(signal.SIGCONT)
        left = self._training_turn.read() - self._clock()
        if 0 < left < 2 * LONGEST_TRAINING_TURN_SECONDS:  # a later end was written before a reboot
            self._sleep(left)
            self._repay(left)
        self._signal(signal.SIGSTOP)
        self._taken_at = self._clock()

    def release(self) -> None:
        """Lets the runs compute until the next `take`."""
        if self._taken_at is not None:
            self._count(self._clock())
            self._signal(signal.SIGCONT)
            self._taken_at, self._released_at = None, self._clock()

    def _repay(self, training_seconds: float) -> None:
        """Takes a training turn off the time used. What a long step leaves unpaid makes the next turn come sooner."""
        if not self._ratio:
            return
        longest_debt = LONGEST_TRAINING_TURN_SECONDS / self._ratio
        paid = training_seconds / self._ratio
        self._used_seconds = min(max(0.0, self._used_seconds - paid), longest_debt)

    def _count(self, now: float) -> None:
        """Adds what the engine has used, or takes off what the runs have had since it was idle."""
        if self._taken_at is not None:
            self._used_seconds += now - self._taken_at
        elif self._ratio:
            self._used_seconds = max(
                0.0, self._used_seconds - (now - self._released_at) / self._ratio
            )
        else:
            self._used_seconds = 0.0

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._runs:
            self._send(pid, number)


class _SharedTime:
    """End of the current training turn (`time.monotonic`), in a mapped file that all engines of the machine share."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.truncate(DOUBLE.size)
            os.posix_fallocate(
                file.fileno(), 0, DOUBLE.size
            )  # a write to a hole on a full disk is a SIGBUS
            self._map = mmap.mmap(file.fileno(), DOUBLE.size)

    def read(self) -> float:
        return float(DOUBLE.unpack(self._map)[0])

    def write(self, moment: float) -> None:
        self._map[:] = DOUBLE.pack(moment)


class SharedRun:
    """Turn-taking of a run: announces it, and resumes it if it stays stopped."""

    def __init__(self, folder: Path, pid: int) -> None:
        self._pid = pid
        self._path = announce(folder, pid)
        self._is_over = threading.Event()
        self._num_stopped_checks = NUM_STOPPED_CHECKS
        self._thread = threading.Thread(target=self._guard, name=f"cores-{pid}", daemon=True)
        self._thread.start()

    def withdraw(self) -> None:
        """Ends the turns: from now on the run computes all the time, and an engine that stops it late is overruled."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._num_stopped_checks = 1

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self.withdraw()

    def _guard(self) -> None:
        num_stopped = 0
        while not self._is_over.wait(GUARD_SECONDS):
            num_stopped = num_stopped + 1 if is_stopped(self._pid) else 0
            if num_stopped >= self._num_stopped_checks:
                signal_group(self._pid, signal.SIGCONT)
                num_stopped = 0


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signals a process group; one that is gone, or belongs to another user, is left alone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def is_stopped(pid: int) -> bool:
    fields = _stat_fields(pid)
    return fields is not None and fields[0] == "T"


def shared_cores(settings: Settings) -> Path | None:
    """Returns the folder in which runs announce themselves, or None if turns are disabled.

    The setting disables them, or a GPU in the machine: runs on a GPU use little CPU time.
    """
    if settings.training_cpu_share == 1 or any(Path(name).exists() for name in GPU_DEVICES):
        return None
    return settings.work_root() / "shared_cores"


def _start_ticks(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may itself hold blanks; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
