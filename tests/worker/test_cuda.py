import subprocess
import sys

import pytest

from app.contracts.messages import ArtifactRef, ImportJob
from app.settings import Settings
from worker.cuda import require, restrict_to
from worker.jobs.run_process import child_environment


@pytest.fixture(autouse=True)
def given_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")


def devices_of_run() -> str:
    """What a run that a train worker starts sees of CUDA_VISIBLE_DEVICES."""
    job = ImportJob(output_model="m", staged=ArtifactRef(key="k", bytes=1), format="folder")
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    environment = child_environment(job, Settings())
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_run_gets_the_devices_that_cuda_shows_to_its_worker() -> None:
    restrict_to("")
    assert devices_of_run() == "2,3"


def test_a_run_gets_the_devices_of_its_workers_setting() -> None:
    restrict_to("1")
    assert devices_of_run() == "1"


def test_a_device_that_cuda_does_not_see_is_refused() -> None:
    require("0,1", 2, "STILLHOUSE_TRAIN_CUDA_DEVICES")
    require("", 0, "STILLHOUSE_TRAIN_CUDA_DEVICES")
    with pytest.raises(SystemExit, match="PyTorch finds 1 of these 2"):
        require("0,1", 1, "STILLHOUSE_TRAIN_CUDA_DEVICES")
