"""Crash points: named places between two steps of a job's life, where a fault test ends or stops the process.

Inert unless STILLHOUSE_CRASH_DIR names a folder. A file there with a point's name arms it for one process: the first that
passes takes the file away and sends itself the signal whose name the file holds (KILL if it is empty).
"""

import os
import signal
from pathlib import Path

_folder: Path | None = None


def arm(folder: str) -> None:
    """Called once by each process, with its setting; an empty one leaves the points inert."""
    global _folder
    _folder = Path(folder) if folder else None


def crash_point(name: str) -> None:
    """Does nothing in production; see above."""
    if _folder is not None:
        _obey(_folder / name)


def _obey(order: Path) -> None:
    taken = order.with_name(f".{order.name}.{os.getpid()}")
    try:
        order.rename(taken)  # of several processes one succeeds
    except FileNotFoundError:
        return
    word = taken.read_text().strip() or "KILL"
    os.kill(os.getpid(), signal.Signals[f"SIG{word}"])
