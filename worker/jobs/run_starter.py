"""Starts run processes: as forks of a process that has imported their modules, or as new ones."""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Final, Protocol

import structlog

from app.parent_death import tethered

log = structlog.get_logger(__name__)

FORKED_MODULES: Final = ("worker.train", "worker.import_model")
# Variables that libraries read when they are loaded. Runs that differ in one of them are not forks
# of the same server.
LOAD_PREFIXES: Final = (
    "GOMP_",
    "HF_",
    "KMP_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "NUMEXPR_",
    "OMP_",
    "OPENBLAS_",
    "PYTHON",
    "PYTORCH_",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
)
SPACE: Final = " " * 2000  # for the command lines of the runs
START_SECONDS: Final = 120.0  # longest time that a server takes to start
STOP_SECONDS: Final = 10.0


class StartedRun(Protocol):
    """The part of `subprocess.Popen` that is used for a run."""

    returncode: int | None
    stdout: IO[bytes] | None

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class ServerGone(Exception):
    """The fork server has ended, or does not answer."""


class ForkedRun:
    """A run that a fork server has started. The server reports its exit status."""

    def __init__(self, status: socket.socket, output: int) -> None:
        self.returncode: int | None = None
        self._status = status
        status.settimeout(START_SECONDS)
        self.pid = self._receive()
        status.settimeout(None)
        self.stdout: IO[bytes] | None = os.fdopen(output, "rb")

    def poll(self) -> int | None:
        """Returns the exit status, or None if the run has not ended."""
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                self._note_end(socket.MSG_DONTWAIT)
        return self.returncode

    def wait(self) -> int:
        """Waits for the end of the run and returns the exit status."""
        if self.returncode is None:
            self._note_end()
        assert self.returncode is not None
        return self.returncode

    def _note_end(self, flags: int = 0) -> None:
        try:
            self.returncode = self._receive(flags)
        except ServerGone:  # the kernel kills the runs of a server that dies
            self.returncode = -signal.SIGKILL
        self._status.close()

    def _receive(self, flags: int = 0) -> int:
        try:
            message = self._status.recv(64, flags)
        except (TimeoutError, ConnectionError) as error:
            raise ServerGone from error
        if not message:
            raise ServerGone
        return int(message)


class RunStarter:
    """A fork server and the socket to it. The server ends with this process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "worker.fork_server", str(theirs.fileno()), SPACE],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], errors: IO[bytes]
    ) -> ForkedRun:
        """Starts a run and returns when its process exists. Raises ServerGone."""
        module, *rest = arguments
        request = {"module": module, "arguments": rest, "environment": dict(environment)}
        output, their_output = os.pipe()
        status, their_status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            descriptors = [their_output, errors.fileno(), their_status.fileno()]
            try:
                socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
            finally:
                os.close(their_output)
                their_status.close()
            return ForkedRun(status, output)
        except (OSError, ServerGone) as error:
            os.close(output)
            status.close()
            raise ServerGone from error

    def close(self) -> None:
        """Ends the server and all its runs."""
        self._control.close()
        try:
            self._server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


_starters: dict[tuple[tuple[str, str], ...], RunStarter] = {}
_lock = threading.Lock()


@atexit.register
def close_starters() -> None:
    """Ends all fork servers."""
    with _lock:
        while _starters:
            _starters.popitem()[1].close()


def start_run(
    arguments: Sequence[str], environment: Mapping[str, str], errors: IO[bytes]
) -> StartedRun:
    """Starts `python -m arguments...` in a session of its own, with a pipe for standard output.

    The process is killed when this process dies.
    """
    # Libraries decide at their import whether they may use the network.
    if arguments[0] in FORKED_MODULES and environment.get("HF_HUB_OFFLINE") == "1":
        for _ in range(2):  # a server that was idle for long may be about to end
            with contextlib.suppress(ServerGone):
                return _fork(arguments, environment, errors)
        log.warning("no_fork_server", module=arguments[0])
    return subprocess.Popen(
        tethered([sys.executable, "-m", *arguments]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=dict(environment),
        start_new_session=True,
    )


def _fork(arguments: Sequence[str], environment: Mapping[str, str], errors: IO[bytes]) -> ForkedRun:
    at_load = sorted(
        (name, value) for name, value in environment.items() if name.startswith(LOAD_PREFIXES)
    )
    key = tuple(at_load)
    with _lock:
        starter = _starters.get(key)
        if starter is None:
            starter = _starters[key] = RunStarter(environment)
    try:
        return starter.start(arguments, environment, errors)
    except ServerGone:
        with _lock:
            if _starters.get(key) is starter:
                del _starters[key]
        starter.close()
        raise
