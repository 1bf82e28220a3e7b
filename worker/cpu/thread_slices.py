"""Longer scheduler slices for threads that compute (Linux 6.12 and later).

A thread that wakes up preempts a thread with longer slices at once. Otherwise it waits until the
running slice ends.
"""

import ctypes
import os
import platform
import struct
import sys
from typing import Final

# system call number of sched_setattr, for which libc has no function
SETATTR: Final = {"x86_64": 314, "aarch64": 274}
# struct sched_attr in its first version: size, policy, flags, nice, priority, runtime, ...
ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")
KEEP_POLICY: Final = 8  # flag: a worker that runs with the idle or batch policy keeps it
LONG_SECONDS: Final = 0.02  # many times the kernel's default slice


def take_long_slices() -> bool:
    """Requests long slices for the calling thread and for the threads that it starts later.

    Returns whether the system call succeeded. Kernels before 6.12 accept it and ignore the slice.
    """
    number = SETATTR.get(platform.machine())
    if number is None or not sys.platform.startswith("linux"):
        return False
    niceness = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread; kept
    asked = ATTRIBUTES.pack(
        ATTRIBUTES.size, 0, KEEP_POLICY, niceness, 0, round(1e9 * LONG_SECONDS), 0, 0
    )
    return bool(ctypes.CDLL(None).syscall(number, 0, asked, 0) == 0)
