"""Who gets a core when all want one: API and queue first, then the engine's steps, then training.

A step that shares its cores with those who carry its tokens is held up for less than a millisecond by them; they, by a whole
step if they must wait for its end (bench/LOG.md).
"""

import os
import sys
import threading
from typing import Final

SERVING: Final = 5
TRAINING: Final = 10


def step_back(niceness: int) -> None:
    """Of the calling thread, and of all that it starts from now on; nothing where threads have no niceness of their own."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))
