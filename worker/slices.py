"""How long a thread computes before the kernel looks who else is there (Linux 6.12 and later).

A thread that wakes up takes the core from one with longer slices at once, and otherwise waits for the end of a slice. Threads that
compute all the time lose nothing by long ones, and those that carry tokens between processes no longer wait for them.
"""

import ctypes
import os
import platform
import struct
import sys
from typing import Final

SETATTR: Final = {"x86_64": 314, "aarch64": 274}  # the number of sched_setattr; libc has no function for it
ATTRIBUTES: Final = struct.Struct(
    "=IIQiIQQQ"
)  # struct sched_attr, its first version; the slice is its sched_runtime
NORMAL_POLICY: Final = 0
LONG_SECONDS: Final = 0.02  # many times the kernel's own, of about 3 ms


def take_long_slices(seconds: float = LONG_SECONDS) -> bool:
    """For the calling thread and those that it starts from now on; gives whether the kernel took it.

    Kernels before 6.12 take it and do nothing.
    """
    number = SETATTR.get(platform.machine())
    if number is None or not sys.platform.startswith("linux"):
        return False
    niceness = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread; left as it is
    asked = ATTRIBUTES.pack(ATTRIBUTES.size, NORMAL_POLICY, 0, niceness, 0, round(seconds * 1e9), 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, asked, 0) == 0)
