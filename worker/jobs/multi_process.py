"""Launches a run with several ranks: one `python -m worker.train` process per rank.

The run ends when rank 0 ends. The ranks stay in the process group of this process and die with it.

torchrun is not used for two reasons. After a SIGTERM it kills ranks that have not ended within
30 seconds and exits with an error. Its processes also leave the process group, which the
supervisor kills as a whole.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from app.parent_death import tethered

POLL_SECONDS = 0.1
VERDICT_SECONDS = 10.0  # time for rank 0 to report an error after another rank has died


def launch(
    arguments: Sequence[str], num_processes: int, meeting: Path, should_stop: Callable[[], bool]
) -> int:
    """Runs all ranks until rank 0 ends or another rank fails; returns the status of the run.

    A negative status is the number of the signal that killed the process. When `should_stop`
    turns true, all ranks get a SIGTERM. `meeting` is the file through which they find each other.
    """
    meeting.parent.mkdir(parents=True, exist_ok=True)
    meeting.unlink(missing_ok=True)
    base = [
        sys.executable,
        "-m",
        "worker.train",
        *arguments,
        "--of",
        str(num_processes),
        "--meeting",
        str(meeting),
    ]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_processes):
            processes.append(subprocess.Popen(tethered([*base, "--rank", str(rank)])))
        return _watch(processes, should_stop)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        meeting.unlink(missing_ok=True)


def _watch(processes: Sequence[subprocess.Popen[bytes]], should_stop: Callable[[], bool]) -> int:
    first, *others = processes
    is_told = False
    while (status := first.poll()) is None:
        if should_stop() and not is_told:
            is_told = True
            for process in processes:
                process.send_signal(signal.SIGTERM)
        dead = next((p for p in others if p.poll() not in (None, 0)), None)
        if dead is not None:
            return _verdict(first, dead, processes.index(dead))
        time.sleep(POLL_SECONDS)
    return status


def _verdict(first: subprocess.Popen[bytes], dead: subprocess.Popen[bytes], rank: int) -> int:
    print(f"process {rank} of the run ended with status {dead.returncode}", file=sys.stderr)
    try:
        first.wait(VERDICT_SECONDS)
    except subprocess.TimeoutExpired:  # rank 0 still waits for the dead rank
        return int(dead.returncode)
    return 0 if first.returncode == 0 else int(dead.returncode)


def exit_like(status: int) -> int:
    """Returns `status`, or kills this process by the same signal if `status` is negative."""
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status
