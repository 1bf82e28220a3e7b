"""Child processes that are kept running: each with its log, started again when it dies, drained at the end."""

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

FIRST_WAIT_SECONDS = 1.0  # before a process that died is started again; doubles up to the longest
LONGEST_WAIT_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a process that lived so long is taken for healthy: waiting begins anew
MAX_LOG_BYTES = 20 * 2**20  # a longer log is put aside when its process starts

SECRETS = frozenset(
    {
        "STILLHOUSE_DATABASE_URL",
        "STILLHOUSE_REDIS_URL",
        "STILLHOUSE_KEY_PEPPER",
        "STILLHOUSE_HF_TOKEN",
    }
)

Say = Callable[[str], None]


class Kept:
    """One process that is started again whenever it dies.

    announces: The command takes `--ready-fd N` and writes a byte to that descriptor once it can work.
    environment: Variables that are set on top of this process's own.
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
        self._ready_fd: int | None = None  # open until the process announces itself or ends
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_at = 0.0
        self._wait_seconds = FIRST_WAIT_SECONDS

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether the process runs and has announced that it can work."""
        if self._ready_fd is not None:
            with contextlib.suppress(BlockingIOError):
                self._has_announced = bool(os.read(self._ready_fd, 1))
                self._close_ready_fd()
        return self._has_announced and self.is_running

    def start(self) -> None:
        """Starts the process. Call it from the thread that lives longest: the process ends with that thread."""
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
                    start_new_session=True,  # a terminal's Ctrl-C is for us, and we drain
                    pass_fds=passed,
                )
        finally:
            for descriptor in passed:
                os.close(descriptor)
        self.num_starts += 1
        self._started_at = time.monotonic()

    def keep(self, say: Say) -> None:
        """Starts the process again if it died and has waited; to be called over and over."""
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
            say(f"{self.name} is started again")

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
    """Lets all drain at once, then kills what is left; gives the names of those that had to be killed."""
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
    """Returns this process's environment for a child that needs no database, queue, API keys or hub token.

    The variables of the artifact store stay, its credentials included.
    """
    return {name: value for name, value in os.environ.items() if name not in SECRETS}


def set_environment(values: Mapping[str, str]) -> None:
    """Sets variables for this process's settings and for its children."""
    os.environ.update(values)
    get_settings.cache_clear()
