"""Wrapper program that runs a command and has it killed when its parent dies. Linux only.

`python -m app.parent_death PARENT COMMAND…` asks the kernel to send SIGKILL when its parent, the
process PARENT, dies. It then replaces itself with the command. It is a separate program because
running code between fork and exec (`preexec_fn`) is not safe in a process with threads.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

PR_SET_PDEATHSIG: Final = 1


def tethered(command: Sequence[str]) -> list[str]:
    """Returns a command line that runs `command` and has it killed when this process dies.

    The kernel watches the *thread* that starts the command: its end kills the command too.
    """
    return [sys.executable, "-m", "app.parent_death", str(os.getpid()), *command]


def die_with_parent(parent: int) -> None:
    """Has this process killed when `parent` dies. Exits with status 1 if it is dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent died before prctl was called
        os._exit(1)


def main(arguments: Sequence[str]) -> NoReturn:
    """Replaces this process with the command. Exits with status 1 if the parent has died."""
    parent, command = int(arguments[0]), list(arguments[1:])
    die_with_parent(parent)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
