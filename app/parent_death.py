"""`python -m app.parent_death PARENT COMMAND…` becomes the command, and dies at once when the process PARENT does.

A start-up of its own, because code between fork and exec is not safe in a process with threads. Linux only.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

PR_SET_PDEATHSIG: Final = 1


def tethered(command: Sequence[str]) -> list[str]:
    """The command, tied to this process. It ends with the *thread* that starts it, too."""
    return [sys.executable, "-m", "app.parent_death", str(os.getpid()), *command]


def main(arguments: Sequence[str]) -> NoReturn:
    parent, command = int(arguments[0]), list(arguments[1:])
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died while we started
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
