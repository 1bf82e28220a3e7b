"""Crash points: named places in the code at which a fault test can kill or stop the process.

Crash points do nothing unless STILLHOUSE_CRASH_DIR names a folder. A file in that folder arms the
crash point of the same name, once. The first process that reaches the crash point removes the file
and sends itself a signal. The file contains the signal's name, such as STOP; empty means KILL.
"""

import os
import signal
from pathlib import Path

_folder: Path | None = None


def arm(folder: str) -> None:
    """Sets the folder of this process's crash points. With an empty name they do nothing."""
    global _folder
    _folder = Path(folder) if folder else None


def crash_point(name: str) -> None:
    """Signals this process if a fault test has armed the crash point; see the module docstring."""
    if _folder is not None:
        _obey(_folder / name)


def _obey(order: Path) -> None:
    taken = order.with_name(f".{order.name}.{os.getpid()}")
    try:
        order.rename(taken)  # succeeds in only one process
    except FileNotFoundError:
        return
    word = taken.read_text().strip() or "KILL"
    os.kill(os.getpid(), signal.Signals[f"SIG{word}"])
