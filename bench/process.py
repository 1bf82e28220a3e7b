"""What a child process knows of itself."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.cases import Entry


def peak_bytes() -> int:
    """The most memory this program ever held. getrusage would count what the forking parent held, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("no VmHWM in /proc/self/status: the bench needs Linux")


def versions() -> Entry:
    found: Entry = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
