"""Time-sharing of CPU cores between a serve worker and the training runs (gang scheduling).

An engine and a training run both use all cores, and each parallel region ends in a barrier. If
both ran at once, threads would wait at barriers for threads that are not scheduled. Most of the
CPU time would be lost.

They take turns instead. While the engine has work, it stops the process groups of the runs
(SIGSTOP). After each of its turns it lets them compute (SIGCONT) for their share of the time. A
run is never stopped while the engine is idle.

The number of threads of either side never changes, so that results do not depend on the load.
The train worker announces each run with a file in a shared folder, on machines without a GPU. A
serve worker that is killed during its turn leaves the runs stopped; the train worker resumes them
after two seconds.
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
# Normally also the longest wait of a prompt that arrives during a training turn.
LONGEST_TRAINING_TURN_SECONDS: Final = 0.2
RESCAN_SECONDS: Final = 0.1  # interval at which an engine looks for new and ended runs
GUARD_SECONDS: Final = 0.2  # interval at which a train worker checks if its run is stopped
DOUBLE: Final = struct.Struct("=d")
GPU_DEVICES: Final = ("/dev/nvidiactl", "/dev/kfd")
NUM_STOPPED_CHECKS: Final = 10  # a run that is stopped in this many checks in a row is resumed


class Announcement(BaseModel):
    """Content of the file with which a run announces that it shares the cores.

    The start time and boot id distinguish the run from a later process with the same pid.
    """

    pid: int
    start_ticks: int
    boot_id: str


def announce(folder: Path, pid: int) -> Path | None:
    """Announces the process group `pid`; returns the file, or None if the process has ended."""
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
    """Returns the announced process groups that are alive; deletes the files of all others."""
    pids = []
    for path in folder.glob("*.json"):
        try:
            run = Announcement.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        if run.boot_id == _boot_id() and _start_ticks(run.pid) == run.start_ticks:
            pids.append(run.pid)
        elif run.boot_id != _boot_id() or _start_ticks(run.pid) is None:
            # The file of another user cannot be deleted; the worker of that user does it.
            with contextlib.suppress(OSError):
                path.unlink()
    return pids


class CoreTurns:
    """Engine side of the time-sharing. Not thread-safe.

    Call `take` before each step and `release` when the engine is idle. `training_share` is the
    fraction of the time that runs get while the engine is busy, in [0, 1).
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
        self._used_seconds = 0.0  # serving time that training turns have not yet compensated
        self._taken_at: float | None = None
        self._released_at = 0.0

    def take(self) -> None:
        """Stops the runs, so that the engine can compute.

        If a training turn is due or in progress, this blocks until the turn is over.
        """
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
        # The clock restarts at a reboot, so an end that is further away is from before a reboot.
        if 0 < left < 2 * LONGEST_TRAINING_TURN_SECONDS:
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
        """Subtracts a training turn from the serving time that is to be compensated.

        After a long step a remainder is left, which brings the next training turn forward. The
        remainder is limited to what one longest turn compensates.
        """
        if not self._ratio:
            return
        longest_debt = LONGEST_TRAINING_TURN_SECONDS / self._ratio
        paid = training_seconds / self._ratio
        self._used_seconds = min(max(0.0, self._used_seconds - paid), longest_debt)

    def _count(self, now: float) -> None:
        """Updates `_used_seconds`: adds serving time, or subtracts the engine's idle time."""
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
    """End of the current training turn, in a mapped file that all engines of the machine share.

    The time is in seconds of `time.monotonic`.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.truncate(DOUBLE.size)
            # Allocate now: writing to a hole of a mapped file on a full disk raises SIGBUS.
            os.posix_fallocate(file.fileno(), 0, DOUBLE.size)
            self._map = mmap.mmap(file.fileno(), DOUBLE.size)

    def read(self) -> float:
        return float(DOUBLE.unpack(self._map)[0])

    def write(self, moment: float) -> None:
        self._map[:] = DOUBLE.pack(moment)


class SharedRun:
    """Run side of the time-sharing: announces a run, and resumes it if it stays stopped.

    The checks are made by a thread of the train worker.
    """

    def __init__(self, folder: Path, pid: int) -> None:
        self._pid = pid
        self._path = announce(folder, pid)
        self._is_over = threading.Event()
        self._num_stopped_checks = NUM_STOPPED_CHECKS
        self._thread = threading.Thread(target=self._guard, name=f"cores-{pid}", daemon=True)
        self._thread.start()

    def withdraw(self) -> None:
        """Ends the time-sharing, so that the run can compute all the time.

        An engine may still stop the run until its next scan. The run is then resumed at the next
        check.
        """
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
    """Sends a signal to a process group; ignores groups that have ended or are of another user."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def is_stopped(pid: int) -> bool:
    """Returns whether the process is suspended by a signal."""
    fields = _stat_fields(pid)
    return fields is not None and fields[0] == "T"


def shared_cores(settings: Settings) -> Path | None:
    """Returns the folder in which runs announce themselves, or None if time-sharing is disabled.

    It is disabled by the setting, and on machines with a GPU, where runs need little CPU time.
    """
    if settings.training_cpu_share == 1 or any(Path(name).exists() for name in GPU_DEVICES):
        return None
    return settings.work_root() / "shared_cores"


def _start_ticks(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def _stat_fields(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat after the name; None if there is no such process.

    The name may contain spaces and parentheses, so the text is split at the last parenthesis.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
