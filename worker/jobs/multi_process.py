"""A run of several processes: `python -m worker.train` as often as there are cards, and over when the first of them is.

They stay in this process's group and die with it. torchrun would do, but it answers SIGTERM with an error status after
killing what has not ended within 30 seconds, and its processes leave the group that a supervisor ends.
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
VERDICT_SECONDS = 10.0  # for the first process to say what went wrong when another has died


def launch(
    arguments: Sequence[str], num_processes: int, meeting: Path, should_stop: Callable[[], bool]
) -> int:
    """Runs them until the first has ended, or another has died; gives that one's status.

    A status below 0 is the signal that killed it. A stop is passed on to all.
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
    except subprocess.TimeoutExpired:  # it waits for the dead one
        return int(dead.returncode)
    return 0 if first.returncode == 0 else int(dead.returncode)


def exit_like(status: int) -> int:
    """Gives the exit status, or dies by the signal that ended the process whose status this is."""
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status
