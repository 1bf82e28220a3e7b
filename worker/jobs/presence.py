"""Heartbeat thread of a train worker: tells the API that it is alive, and how fast its machine is.

The heartbeat is a key in Redis that expires. Jobs do not depend on it: their leases are in the
database. An outage of Redis only hides the worker from estimates.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Self

import structlog
from pydantic import ValidationError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.contracts.train_workers import (
    QUANTIZATION_PACKAGE,
    MachineProfile,
    TrainWorkerStatus,
    supported_precisions,
    train_worker_key,
)
from app.parent_death import tethered
from app.settings import Settings
from worker.cuda import visible_devices

log = structlog.get_logger(__name__)

MISSES: Final = 3  # heartbeats that may be late before the key expires
SOCKET_SECONDS: Final = 3.0
IDLE_SECONDS: Final = 15.0  # how long a worker has no job before its machine is measured
MEASURE_SECONDS: Final = 120.0
PROFILE_VERSION: Final = 2  # profiles of older versions are not read
BUSY_LOAD: Final = 0.5  # a machine with more load per core is measured again when it has less
RETRY_SECONDS: Final = 3600.0  # how long after a failed measurement the next one may start
MEASURE_COMMAND: Final = (sys.executable, "-m", "worker.measure_machine")
GPU_COMMAND: Final = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
CAPABILITY_COMMAND: Final = (
    "nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id",
)  # fmt: skip
GPU_SECONDS: Final = 20.0  # timeout of `nvidia-smi`, which is slow if the driver is not loaded
CGROUP_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


class Presence:
    """Context manager that sends heartbeats. `job_id` is the job that the worker runs, if any."""

    def __init__(self, worker_id: str, settings: Settings) -> None:
        self.job_id: str | None = None
        self._worker_id = worker_id
        self._settings = settings
        self._redis = Redis.from_url(
            settings.redis_url,
            socket_timeout=SOCKET_SECONDS,
            socket_connect_timeout=SOCKET_SECONDS,
            retry=Retry(NoBackoff(), 1),  # a connection may be stale after a restart of Redis
        )
        self._path: Path | None = None  # of the profile; known once the thread runs
        self._profile: MachineProfile | None = None
        self._num_devices: int | None = None
        self._teacher_precisions: tuple[str, ...] | None = None
        self._measurement: subprocess.Popen[bytes] | None = None
        self._load = 0.0  # before the measurement
        self._idle_since = time.monotonic()
        self._measures_from = 0.0  # no measurement starts before this time
        self._is_seen = True
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def note_job(self, job_id: str | None) -> None:
        """Sets the job that the worker runs, or None after it."""
        self.job_id = job_id
        self._idle_since = time.monotonic()

    def _run(self) -> None:
        self._path = profile_path(self._settings)
        self._profile = load_profile(self._path)
        self._num_devices = most_devices(self._settings)
        self._teacher_precisions = teacher_precisions()
        while True:
            self._measure_if_idle()
            self._beat()
            if self._is_over.wait(self._settings.heartbeat_seconds):
                break
        if self._measurement is not None:
            self._measurement.kill()
            self._measurement.communicate()  # and closes the pipe
        with suppress(RedisError, OSError):  # the key expires in any case
            self._redis.delete(train_worker_key(self._worker_id))
        self._redis.close()

    def _beat(self) -> None:
        try:
            status = TrainWorkerStatus(
                worker_id=self._worker_id,
                memory_bytes=usable_memory_bytes(),
                job_id=self.job_id,
                profile=self._profile,
                num_devices=self._num_devices,
                teacher_precisions=self._teacher_precisions,
                beat_at=time.time(),
            )
            self._redis.set(
                train_worker_key(self._worker_id),
                status.model_dump_json(),
                px=int(1000 * MISSES * self._settings.heartbeat_seconds),
            )
            self._is_seen = True
        except (RedisError, OSError) as fault:
            if self._is_seen:
                log.warning("presence_unsent", reason=type(fault).__name__)
            self._is_seen = False

    def _measure_if_idle(self) -> None:
        """Starts the measurement of an idle machine, or takes its result."""
        if self._measurement is not None:
            self._take_measurement(self._measurement)
        elif self._should_measure and self._is_idle and time.monotonic() >= self._measures_from:
            assert self._path is not None
            # another worker may have measured it
            self._profile = load_profile(self._path) or self._profile
            if self._should_measure:
                self._start_measurement()

    @property
    def _should_measure(self) -> bool:
        """True if there is no profile, or one of a busy machine that now has less than half its load."""
        profile = self._profile
        if profile is None:
            return True
        return profile.load > BUSY_LOAD and load_per_core() < profile.load / 2

    def _start_measurement(self) -> None:
        self._load = load_per_core()
        try:
            self._measurement = subprocess.Popen(
                tethered(MEASURE_COMMAND),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as fault:  # no memory, or too many processes
            self._try_again_later(reason=str(fault))

    def _try_again_later(self, *, reason: str) -> None:
        """Logs that a measurement has failed. The heartbeats continue without a profile."""
        log.warning("machine_not_measured", reason=reason, retry_seconds=RETRY_SECONDS)
        self._measures_from = time.monotonic() + RETRY_SECONDS

    @property
    def _is_idle(self) -> bool:
        return self.job_id is None and time.monotonic() - self._idle_since > IDLE_SECONDS

    def _take_measurement(self, process: subprocess.Popen[bytes]) -> None:
        """Takes the profile of a measurement that has ended, unless a job ran beside it."""
        assert process.stdout is not None
        assert self._path is not None
        if process.poll() is None:
            if time.monotonic() - self._idle_since < IDLE_SECONDS + MEASURE_SECONDS:
                return
            process.kill()
        printed = process.stdout.read()
        process.wait()
        process.stdout.close()
        self._measurement = None
        if not self._is_idle:
            return
        try:
            measured = MachineProfile.model_validate_json(printed)
        except ValidationError:
            self._try_again_later(reason=f"the process ended with status {process.returncode}")
            return
        self._profile = measured.model_copy(update={"load": self._load})
        save_profile(self._path, self._profile)
        log.info("machine_measured", **self._profile.model_dump())


def most_devices(settings: Settings) -> int | None:
    """Returns the most CUDA devices that a job may ask for, or None if it may ask for any number."""
    if settings.num_processes:  # replaces the number of all jobs
        return None
    try:
        return len(visible_devices()) or None
    except (OSError, subprocess.SubprocessError):  # the next job will report it
        return None


def teacher_precisions() -> tuple[str, ...] | None:
    """Returns the formats to which jobs can quantise a teacher here, or None if that is unknown."""
    if find_spec(QUANTIZATION_PACKAGE) is None:
        return ()
    try:
        devices = visible_devices()
    except (OSError, subprocess.SubprocessError):
        return None
    capabilities = [_capability(device) for device in devices]
    if None in capabilities:
        return None
    least = min((found for found in capabilities if found is not None), default=None)
    return supported_precisions(has_package=True, capability=least)


def _capability(device: str) -> tuple[int, int] | None:
    """Returns the compute capability of a GPU, or None if `nvidia-smi` does not tell it."""
    try:
        process = subprocess.run(
            (*CAPABILITY_COMMAND, device),
            capture_output=True,
            text=True,
            check=True,
            timeout=GPU_SECONDS,
        )
        major, minor = process.stdout.strip().split(".")
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def load_per_core() -> float:
    """Returns the load average of the last minute per core, or 0 if the system does not tell it."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return 0.0


def usable_memory_bytes() -> int:
    """Returns the memory of the machine, or of the container if that is less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            found.append(int(text))
    return min(found)


def profile_path(settings: Settings) -> Path:
    """Returns the file that keeps the profile of this machine.

    It is in the user's cache folder, because all services on a machine measure the same. Without
    such a folder it is among the work folders. The name of the file contains everything that the
    speed depends on, because several machines may share the folder.
    """
    parts = [
        str(PROFILE_VERSION),
        platform.node(),
        *_gpu_models(),
        version("torch"),
        platform.machine(),
        _cpu_model(),
        str(os.cpu_count()),
        str(settings.num_threads),
        settings.train_cuda_devices,
    ]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    home = Path(os.path.expanduser("~/.cache/stillhouse"))
    folder = home if home.is_absolute() else settings.work_root()
    return folder / f"machine-{name}.json"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def _gpu_models() -> list[str]:
    """Returns the models of the GPUs, or an empty list if the NVIDIA driver is not installed."""
    try:
        process = subprocess.run(
            GPU_COMMAND, capture_output=True, text=True, check=True, timeout=GPU_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return process.stdout.splitlines()


def load_profile(path: Path) -> MachineProfile | None:
    """Returns the profile in a file, or None if there is none that can be read."""
    try:
        return MachineProfile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def save_profile(path: Path, profile: MachineProfile) -> None:
    """Writes the profile. A folder that cannot be written is no error: it is measured again."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(profile.model_dump_json())
        partial.replace(path)
    except OSError as error:
        log.warning("profile_not_saved", reason=str(error))
