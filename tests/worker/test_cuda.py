import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.contracts.messages import ArtifactRef, DistillationJob, ImportJob
from app.settings import Settings
from worker.cuda import claim_devices, device_names, require, restrict_to
from worker.errors import TooFewDevices
from worker.jobs import run_specs
from worker.jobs.run_process import child_environment

IMPORT = ImportJob(output_model="m", staged=ArtifactRef(key="k", bytes=1), format="folder")
VISIBLE = ("2", "5", "7")  # devices of the worker
CLAIM_ONE = """
import sys, worker.cuda
from app.settings import get_settings
claim = worker.cuda.claim_devices(sys.argv[1].split(","), 1, get_settings())
print("claimed", *claim.devices, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("STILLHOUSE_WORK_DIR", str(tmp_path))
    return Settings()


@pytest.fixture(autouse=True)
def given_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")


@pytest.fixture
def claim_elsewhere(settings: Settings) -> Iterator[Callable[[str], str]]:
    """A function that claims a device in another process, which ends with the test."""
    others = []

    def claim(devices: str) -> str:
        other = subprocess.Popen(
            [sys.executable, "-c", CLAIM_ONE, devices],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        others.append(other)
        assert other.stdout is not None
        lines = iter(other.stdout.readline, "")  # a warning may come first
        return next(line for line in lines if line.startswith("claimed ")).split()[1]

    yield claim
    for other in others:
        other.communicate("")


def job(num_devices: int) -> DistillationJob:
    folder = {"key": "k", "bytes": 1}
    block = {"teacher": "t", "hyperparameters": {"num_devices": num_devices}}
    return DistillationJob.model_validate(
        {
            "distillation": block,
            "teacher": folder,
            "start": folder,
            "training_file": folder,
            "output_model": "m",
            "seed": 0,
        }
    )


def devices_of_run(job: DistillationJob | ImportJob, settings: Settings) -> str:
    """What the run process of a job sees of CUDA_VISIBLE_DEVICES."""
    claim = run_specs.devices_for(job, VISIBLE, settings)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    environment = child_environment(job, settings, claim)
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    claim.close()
    return printed.strip()


@pytest.mark.parametrize(("count", "seen"), [(1, "2"), (2, "2,5"), (3, "2,5,7")])
def test_a_run_sees_as_many_devices_as_its_job_asks_for(
    count: int, seen: str, settings: Settings
) -> None:
    assert devices_of_run(job(count), settings) == seen


def test_the_setting_overrides_the_number_of_devices_of_a_job(settings: Settings) -> None:
    assert devices_of_run(job(1), settings.model_copy(update={"num_processes": 2})) == "2,5"
    assert devices_of_run(job(1), settings.model_copy(update={"num_processes": 9})) == "2,5,7"


def test_an_import_sees_no_device(settings: Settings) -> None:
    assert devices_of_run(IMPORT, settings) == ""


def test_a_job_that_asks_for_more_devices_than_its_worker_has_is_refused(
    settings: Settings,
) -> None:
    with pytest.raises(TooFewDevices, match="asks for 4 CUDA devices, but its worker has 3"):
        run_specs.devices_for(job(4), VISIBLE, settings)


def test_a_job_runs_on_a_host_without_devices(settings: Settings) -> None:
    claim = claim_devices((), 4, settings)
    assert not claim.devices
    assert not claim.environment


def test_workers_of_a_host_take_different_devices_while_there_are_enough(
    settings: Settings, claim_elsewhere: Callable[[str], str]
) -> None:
    assert claim_elsewhere("0,1,2") == "0"
    claim = claim_devices("012", 1, settings)
    assert claim.devices == ("1",)
    assert claim_elsewhere("0,1") == "0"  # both are taken, and one is shared
    claim.close()
    assert claim_elsewhere("0,1") == "1"


def test_devices_of_a_killed_worker_are_free_again(settings: Settings) -> None:
    code = CLAIM_ONE.replace("sys.stdin.read()", "import os; os.kill(os.getpid(), 9)")
    subprocess.run([sys.executable, "-c", code, "0"], check=False, stdout=subprocess.DEVNULL)
    claim = claim_devices("01", 1, settings)
    assert claim.devices == ("0",)
    claim.close()


def test_devices_are_named_as_in_the_environment() -> None:
    assert device_names(None, 2) == ("0", "1")
    assert device_names("GPU-5f, MIG-GPU-1/2/3", 2) == ("GPU-5f", "MIG-GPU-1/2/3")
    assert device_names("4,9,5", 1) == ("4",)  # CUDA ignores those after a missing device
    assert device_names("", 0) == ()


def test_the_setting_of_a_worker_replaces_the_devices_given_by_hand() -> None:
    restrict_to("")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    restrict_to("1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_device_that_cuda_does_not_see_is_refused() -> None:
    require("0,1", 2, "STILLHOUSE_TRAIN_CUDA_DEVICES")
    require("", 0, "STILLHOUSE_TRAIN_CUDA_DEVICES")
    with pytest.raises(SystemExit, match="PyTorch finds 1 of these 2"):
        require("0,1", 1, "STILLHOUSE_TRAIN_CUDA_DEVICES")
