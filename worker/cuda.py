"""Chooses the CUDA devices that a worker and its child processes use.

CUDA_VISIBLE_DEVICES lists the devices. The settings STILLHOUSE_TRAIN_CUDA_DEVICES and
STILLHOUSE_SERVE_CUDA_DEVICES replace it for train and serve workers. Their numbers are those of
nvidia-smi.

A serve worker uses one of its devices, and a run as many as its job asks for. Both prefer devices
that no other worker of the host has claimed. A claim is a lock on a file, so it ends with its
process.
"""

import fcntl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote

import structlog

from app.local.process_manager import environment_without_secrets, set_environment
from app.settings import Settings
from worker.errors import TooFewDevices

log = structlog.get_logger(__name__)

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
# A host with a driver has one of these: NVIDIA, WSL, Jetson, ROCm.
DRIVER_FILES: Final = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-ctrl-gpu", "/dev/kfd")


@dataclass(frozen=True)
class DeviceClaim:
    """Devices of one serve worker or one run, until `close`.

    `environment` holds the variables that hide all other devices. It is empty on a host without
    CUDA devices.
    """

    devices: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    locks: tuple[IO[str], ...] = ()

    def close(self) -> None:
        for lock in self.locks:
            lock.close()


NO_DEVICES: Final = DeviceClaim()


def restrict_to(devices: str) -> None:
    """Hides all other devices from this process and its children.

    Call it before CUDA is initialised. An empty list changes nothing.
    """
    if devices:
        set_environment({VISIBLE: devices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})


def require(devices: str, num_visible: int, setting: str) -> None:
    """Exits with an error if fewer devices are visible than are listed.

    CUDA silently ignores a device that does not exist, and all devices listed after it.
    """
    num_listed = len(devices.split(",")) if devices else 0
    if num_listed > num_visible:
        sys.exit(
            f"{setting} is {devices}, but PyTorch finds {num_visible} of these {num_listed} CUDA devices; "
            "use devices that nvidia-smi -L lists, each of them once"
        )


def visible_devices() -> tuple[str, ...]:
    """Returns the names of the devices that this process may use, as in CUDA_VISIBLE_DEVICES."""
    if not any(Path(file).exists() for file in DRIVER_FILES):
        return ()
    return device_names(environment_without_secrets().get(VISIBLE), count_in_child())


def device_names(listed: str | None, num_visible: int) -> tuple[str, ...]:
    """Returns the names of the visible devices. `listed` is CUDA_VISIBLE_DEVICES, if it is set."""
    names = [str(i) for i in range(num_visible)] if listed is None else listed.split(",")
    return tuple(name.strip() for name in names[:num_visible])


@lru_cache(maxsize=1)
def count_in_child() -> int:
    """Returns the number of visible devices, without importing torch into this process.

    The number is kept, because the child process takes seconds. Call `restrict_to` first.
    """
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout)


def claim_for_serving(settings: Settings) -> DeviceClaim:
    """Claims one device for this process and hides the others. Call it before CUDA is initialised.

    Exits with an error if a device of the setting does not exist.
    """
    if settings.serve_device == "cpu":
        return NO_DEVICES
    restrict_to(settings.serve_cuda_devices)
    visible = visible_devices()
    require(settings.serve_cuda_devices, len(visible), "STILLHOUSE_SERVE_CUDA_DEVICES")
    claim = claim_devices(visible, 1, settings)
    set_environment(claim.environment)
    return claim


def claim_devices(devices: Sequence[str], count: int, settings: Settings) -> DeviceClaim:
    """Claims `count` of the given devices: first those that are free, in their order.

    Devices that another worker has claimed are shared if there are too few free ones. On a host
    without devices the claim is empty.

    Raises TooFewDevices if fewer than `count` devices are given, but at least one.
    """
    if not devices:
        return NO_DEVICES
    if count > len(devices):
        raise TooFewDevices(
            f"the job asks for {count} CUDA devices, but its worker has {len(devices)}; lower "
            f"num_devices, or start a train worker with {count} devices"
        )
    folder = settings.work_root() / "devices"
    folder.mkdir(parents=True, exist_ok=True)
    locks: dict[str, IO[str]] = {}
    for device in devices:
        if len(locks) == count:
            break
        if (lock := _lock(folder / quote(device, safe=""))) is not None:
            locks[device] = lock
    shared = [device for device in devices if device not in locks][: count - len(locks)]
    if shared:
        log.warning("cuda_devices_shared", devices=shared)
    chosen = tuple(device for device in devices if device in locks or device in shared)
    return DeviceClaim(chosen, {VISIBLE: ",".join(chosen)}, tuple(locks.values()))


def _lock(path: Path) -> IO[str] | None:
    """Returns the file, locked until it is closed, or None if it is locked already."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
