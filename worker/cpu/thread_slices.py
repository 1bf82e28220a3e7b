"""How long a thread computes before the kernel looks who else is there (Linux 6.12 and later).

A thread that wakes up takes the core from one with longer slices at once, and otherwise waits for the end of a slice.
"""

import ctypes
import os
import platform
import struct
import sys
from typing import Final

SETATTR: Final = {
    "x86_64": 314,
    "aarch64": 274,
}  # the number of sched_setattr; libc has no function for it
ATTRIBUTES: Final = struct.Struct(
    "=IIQiIQQQ"
)  # struct sched_attr in its first version: size, policy, ...
KEEP_POLICY: Final = 8  # a worker that runs as idle or batch work stays so
LONG_SECONDS: Final = 0.02  # many times the kernel's own, 1.4 ms on two cores


def take_long_slices() -> bool:
    """For the calling thread and those that it starts from now on; whether the kernel took it, if only to ignore it."""
    number = SETATTR.get(platform.machine())
    if number is None or not sys.platform.startswith("linux"):
        return False
    niceness = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread; left as it is
    asked = ATTRIBUTES.pack(
        ATTRIBUTES.size, 0, KEEP_POLICY, niceness, 0, round(1e9 * LONG_SECONDS), 0, 0
    )
    return bool(ctypes.CDLL(None).syscall(number, 0, asked, 0) == 0)
