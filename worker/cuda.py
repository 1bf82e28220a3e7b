"""Restricts the CUDA devices that a worker and its child processes can use.

CUDA_VISIBLE_DEVICES lists the devices. The settings STILLHOUSE_TRAIN_CUDA_DEVICES and
STILLHOUSE_SERVE_CUDA_DEVICES replace it for train and serve workers. Their numbers are those of
nvidia-smi.
"""

import subprocess
import sys

from app.local.process_manager import set_environment


def restrict_to(devices: str) -> None:
    """Hides all other devices from this process and its children.

    Call it before CUDA is initialised. An empty list changes nothing.
    """
    if devices:
        set_environment({"CUDA_VISIBLE_DEVICES": devices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})


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


def count_in_child() -> int:
    """Returns the number of visible devices, without importing torch into this process."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout)
