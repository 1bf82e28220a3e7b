"""Child processes that are restarted when they end, each with a log file."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from app.parent_death import tethered
from app.settings import get_settings

FIRST_WAIT_SECONDS = 1.0  # delay before the first restart; doubles with each further restart
LONGEST_WAIT_SECONDS = 30.0
STEADY_SECONDS = 60.0  # running time after which the restart delay is reset
MAX_LOG_BYTES = 20 * 2**20  # a larger log is renamed when its process starts

SECRETS = frozenset(
    {
        "STILLHOUSE_DATABASE_URL",
        "STILLHOUSE_REDIS_URL",
        "STILLHOUSE_KEY_PEPPER",
        "STILLHOUSE_HF_TOKEN",
        "STILLHOUSE_MLFLOW_TRACKING_URI",
        "STILLHOUSE_WANDB_API_KEY",
    }
)

Say = Callable[[str], None]


class Kept:
    """Child process that is restarted whenever it ends.

    Args:
        announces: True if the command takes `--ready-fd N`. It must then write a byte to that file
            descriptor when it is ready for work.
        environment: Variables to set in addition to those of this process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_dir: Path,
        *,
        announces: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.environment = environment
        self.log_path = log_dir / f"{name}.log"
        self.num_starts = 0
        self._command = command
        self._announces = announces
        self._has_announced = False
        self._ready_fd: int | None = None  # open until the process is ready or is restarted
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_at = 0.0
        self._wait_seconds = FIRST_WAIT_SECONDS

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        """True if the process is running and has announced that it is ready."""
        if self._ready_fd is not None:
            with contextlib.suppress(BlockingIOError):
                self._has_announced = bool(os.read(self._ready_fd, 1))
                self._close_ready_fd()
        return self._has_announced and self.is_running

    def start(self) -> None:
        """Starts the process.

        Call it from a thread that lives as long as this process: the kernel kills the child when
        the thread that started it ends.
        """
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists() and self.log_path.stat().st_size > MAX_LOG_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.old"))
        self._close_ready_fd()
        self._has_announced = False
        command, passed = list(self._command), []
        if self._announces:
            self._ready_fd, write_fd = os.pipe()
            os.set_blocking(self._ready_fd, False)
            command += ["--ready-fd", str(write_fd)]
            passed = [write_fd]
        try:
            with self.log_path.open("ab") as output:
                self._process = subprocess.Popen(
                    tethered(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self.environment,
                    start_new_session=True,  # Ctrl-C reaches only this process, which drains
                    pass_fds=passed,
                )
        finally:
            for descriptor in passed:
                os.close(descriptor)
        self.num_starts += 1
        self._started_at = time.monotonic()

    def keep(self, say: Say) -> None:
        """Restarts the process if it has ended and the restart delay is over.

        Call it periodically. `say` receives the messages for the user.
        """
        if self.is_running:
            return
        now = time.monotonic()
        if self._process is not None:
            say(
                f"{self.name} ended with status {self._process.returncode}; its log ends with:\n{self.log_tail()}"
            )
            self._process = None
            if now - self._started_at > STEADY_SECONDS:
                self._wait_seconds = FIRST_WAIT_SECONDS
            self._start_at = now + self._wait_seconds
            self._wait_seconds = min(2 * self._wait_seconds, LONGEST_WAIT_SECONDS)
        elif now >= self._start_at:
            self.start()
            say(f"{self.name} is being restarted")

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def _close_ready_fd(self) -> None:
        if self._ready_fd is not None:
            os.close(self._ready_fd)
            self._ready_fd = None

    def log_tail(self, num_bytes: int = 2000) -> str:
        if not self.log_path.exists():
            return "(no log)"
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - num_bytes))
            return log.read().decode(errors="replace").strip()


def stop_all(
    kept: Sequence[Kept], *, grace_seconds: float, is_urgent: Callable[[], bool]
) -> list[str]:
    """Sends SIGTERM to all processes at once, waits, and kills those that are still running.

    The wait ends after `grace_seconds`, or earlier if `is_urgent` returns True. Returns the names
    of the processes that were killed.
    """
    for process in kept:
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while (
        any(process.is_running for process in kept)
        and time.monotonic() < deadline
        and not is_urgent()
    ):
        time.sleep(0.05)
    late = [process for process in kept if process.is_running]
    for process in late:
        process.kill()
    return [process.name for process in late]


def environment_without_secrets() -> dict[str, str]:
    """Returns this process's environment without the secrets of the database, queue, keys and hub.

    The variables and credentials of the artifact store are kept.
    """
    return {name: value for name, value in os.environ.items() if name not in SECRETS}


def set_environment(values: Mapping[str, str]) -> None:
    """Sets environment variables for this process and its children, and reloads the settings."""
    os.environ.update(values)
    get_settings.cache_clear()
