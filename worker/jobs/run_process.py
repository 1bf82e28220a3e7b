"""Run process in its own process group: starts it, reads its lines and explains its death."""

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError

from app.contracts.messages import AnyJob, ImportJob
from app.local.process_manager import environment_without_secrets
from app.settings import Settings
from app.tracing.spans import end_span, start_span
from worker.core_sharing import SharedRun
from worker.cuda import NO_DEVICES, DeviceClaim
from worker.disk import mentions_full_disk
from worker.errors import DiskFull
from worker.jobs.run_starter import start_run
from worker.protocol.run_lines import RunLine, StageLine, run_line

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = structlog.get_logger(__name__)

MAX_WAITING_LINES = 1000  # when the queue is full, the pipe fills up and the run blocks
PIPE_SECONDS = 5.0  # longest wait for remaining lines after the process has ended
# Lines at the end of standard error that hold the exception of a traceback. Earlier lines may be
# warnings.
LAST_LINES = 3
MEMORY_WORDS = ("MemoryError", "OutOfMemoryError", "allocate memory", "not enough memory")


class RunProcess:
    """`python -m module ...` in its own session. It dies with this process in all cases."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        shared_cores: Path | None = None,
    ) -> None:
        self._error_path = folder / "stderr.log"
        self._oom_kills = num_oom_kills()
        with self._error_path.open("wb") as errors:
            self._process = start_run(arguments, environment, errors)
        self._lines: queue.Queue[RunLine] = queue.Queue(MAX_WAITING_LINES)
        self._heard_at = time.monotonic()
        self._is_closed = threading.Event()
        self._stage_span: Span | None = None
        self._reader = threading.Thread(
            target=copy_context().run,  # its log lines name the job
            args=(self._read,),
            name=f"lines-{self.pid}",
            daemon=True,
        )
        self._reader.start()
        self._shared = SharedRun(shared_cores, self.pid) if shared_cores is not None else None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_over(self) -> bool:
        """True if the process has ended and all its lines have been taken.

        A surviving child of the run can keep the pipe open forever, so the wait for the end of
        the pipe is limited to `PIPE_SECONDS`.
        """
        if self._process.returncode is None and self._process.poll() is not None:
            # Restart the limit now: if this process was suspended, unread lines may remain.
            self._heard_at = time.monotonic()
        is_read = not self._reader.is_alive() or self.silent_seconds > PIPE_SECONDS
        return self._process.returncode is not None and is_read and self._lines.empty()

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._heard_at

    def take_lines(self, timeout_seconds: float) -> list[RunLine]:
        """Returns the lines written so far; waits up to `timeout_seconds` for the first one."""
        lines: list[RunLine] = []
        with contextlib.suppress(queue.Empty):
            lines.append(self._lines.get(timeout=timeout_seconds))
            self._heard_at = time.monotonic()  # the next line may have waited for a free slot
            while len(lines) < MAX_WAITING_LINES:
                lines.append(self._lines.get_nowait())
        return lines

    def ask_to_stop(self) -> None:
        if self._shared is not None:
            self._shared.withdraw()  # the run has a deadline and must not be suspended any more
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the whole process group and discards its remaining lines."""
        self._is_closed.set()
        if self._process.poll() is None or self._reader.is_alive():
            self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=PIPE_SECONDS)
        if self._shared is not None:
            self._shared.close()

    def describe_death(self) -> tuple[str, str]:
        """Returns a message and an error code for a run that ended without an outcome line."""
        status = self._process.wait()
        tail = self._error_path.read_bytes()[-4000:].decode(errors="replace")
        log.warning("run_died", pid=self.pid, status=status, stderr=tail)
        is_oom_kill = status == -signal.SIGKILL and num_oom_kills() > self._oom_kills
        if is_oom_kill or (status != 0 and any(word in tail for word in MEMORY_WORDS)):
            return "The run ran out of memory.", "out_of_memory"
        if status > 0 and mentions_full_disk("\n".join(tail.splitlines()[-LAST_LINES:])):
            return "The run failed because its disk is full.", DiskFull.code
        if status < 0:
            return f"The run was killed by {signal.Signals(-status).name}.", "worker_lost"
        return f"The run ended with status {status} and without a result.", "worker_lost"

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole group has already ended
            os.killpg(self.pid, number)

    def _read(self) -> None:
        try:
            self._read_lines()
        finally:
            end_span(self._stage_span)

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for raw in pipe:
                self._heard_at = time.monotonic()
                try:
                    line = run_line.validate_json(raw)
                except ValidationError:
                    log.warning("unreadable_line", pid=self.pid, num_bytes=len(raw))
                    continue
                if isinstance(line, StageLine):
                    self._begin_stage(line.name)
                if not self._put(line):
                    return

    def _begin_stage(self, name: str) -> None:
        """Starts the span of a stage. Its parent is the span of the attempt."""
        end_span(self._stage_span)
        self._stage_span = start_span(f"stage {name}", "internal", {"stillhouse.stage": name})

    def _put(self, line: RunLine) -> bool:
        while not self._is_closed.is_set():
            with contextlib.suppress(queue.Full):
                self._lines.put(line, timeout=0.5)
                return True
        return False


def num_oom_kills() -> int:
    """Returns the kernel's count of out-of-memory kills, on the machine and in our cgroup.

    The two overlap, so only a change of the sum is meaningful.
    """
    return sum(
        int(words[1])
        for path in (Path("/proc/vmstat"), *_memory_event_files())
        if path.is_file()
        for line in path.read_text().splitlines()
        if (words := line.split())[0] == "oom_kill"
    )


def _memory_event_files() -> list[Path]:
    """Returns the files with the out-of-memory counters of our cgroup, for cgroups v1 and v2."""
    membership = Path("/proc/self/cgroup")
    files = []
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files.append(Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "memory.oom_control")
    return files


def child_environment(
    spec: AnyJob, settings: Settings, devices: DeviceClaim = NO_DEVICES
) -> dict[str, str]:
    """Returns the environment of a run: without secrets, and offline unless it is a hub import.

    Only an import that may use the hub token gets the token. The run sees only the CUDA devices
    that are claimed for it.
    """
    is_online = isinstance(spec, ImportJob) and spec.hub is not None
    environment = environment_without_secrets()
    environment |= {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "0" if is_online else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # transformers imports torchao if it is installed, and torchao asks for CUDA. PyTorch then
        # must not initialise it: a process that has done so cannot fork runs.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # glibc keeps freed memory. Otherwise each step would fault in the pages of its large
        # temporary tensors again.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
    }
    if "OMP_WAIT_POLICY" not in environment:
        # A thread spins at a barrier for a fraction of a millisecond and then sleeps. Waking it
        # takes as long as a small matmul, but one that spins longer could take the core that the
        # thread it waits for needs.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment.setdefault("GOMP_SPINCOUNT", "10000")
    if is_online:
        environment["HF_HOME"] = str(settings.work_root() / "hub")
    environment |= devices.environment
    if isinstance(spec, ImportJob) and spec.hub is not None and spec.uses_hub_token:
        environment["STILLHOUSE_HF_TOKEN"] = settings.hf_token
    if settings.num_threads:
        environment |= {
            name: str(settings.num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        }
    return environment
