"""Process that starts runs by forking itself: `python -m worker.fork_server FD`.

It imports the modules of the runs once. A fork of it is ready to run at once, while a new process
would import torch and transformers for three seconds. `worker/jobs/run_starter.py` is the client.

FD is a Unix socket of the worker. Each message on it asks for one run, and carries three file
descriptors: standard output, standard error, and a socket on which the server reports the process
id and later the exit status. The server ends when the worker closes its socket, and kills the runs
that are left. It also ends when it has been idle for `IDLE_SECONDS`.
"""

from app.fast_imports import imports_done  # isort: split

import contextlib
import ctypes
import importlib
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from pydantic import BaseModel

# Imported here, so that the forked processes need not import them.
import worker.import_model
import worker.train  # noqa: F401
from app.parent_death import die_with_parent
from app.settings import get_settings

imports_done()

IDLE_SECONDS: Final = 600.0
MAX_REQUEST_BYTES: Final = 1 << 20


class RunRequest(BaseModel):
    """A run: the module, its arguments and the whole environment."""

    module: str
    arguments: list[str]
    environment: dict[str, str]


@dataclass
class Child:
    """A run that was started.

    Its process id is freed only after the client has closed `client`, so the client can send it a
    signal until then.
    """

    pid: int
    pidfd: int
    client: socket.socket


class ForkServer:
    """Event loop of the server. It has no threads of its own, so that it can fork safely."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._children: dict[int, Child] = {}  # by the number of each of their two descriptors

    def serve(self) -> RunRequest | None:
        """Serves until the worker closes its socket, then returns None.

        Returns the request in a forked process, which shall then run it.
        """
        while True:
            ready = self._selector.select(None if self._children else IDLE_SECONDS)
            if not ready:
                return None
            for key, _ in ready:
                child = self._children.get(key.fd)
                if child is not None:
                    self._attend(child, key.fd)
                elif key.fd == self._control.fileno():
                    message, descriptors, _, _ = socket.recv_fds(
                        self._control, MAX_REQUEST_BYTES, 3
                    )
                    if not message:
                        self._end()
                        return None
                    if self._fork(RunRequest.model_validate_json(message), *descriptors):
                        return RunRequest.model_validate_json(message)

    def _fork(self, request: RunRequest, output: int, errors: int, client_fd: int) -> bool:
        """Starts a run. Returns True in the new process."""
        server = os.getpid()
        client = socket.socket(fileno=client_fd)
        has_session, set_session = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            die_with_parent(server)
            os.close(has_session)
            os.close(set_session)
            client.close()
            self._close()
            _become(request, output, errors)
            return True
        os.close(set_session)
        os.read(has_session, 1)  # until the child can be signalled by its group
        os.close(has_session)
        os.close(output)
        os.close(errors)
        child = Child(pid, os.pidfd_open(pid), client)
        for descriptor in (child.pidfd, client.fileno()):
            self._children[descriptor] = child
            self._selector.register(descriptor, selectors.EVENT_READ)
        _report(client, pid)
        return False

    def _attend(self, child: Child, descriptor: int) -> None:
        """Reports the exit of a child, or frees its process id after the client has gone."""
        if descriptor == child.pidfd:
            self._selector.unregister(descriptor)
            del self._children[descriptor]
            info = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT)
            assert info is not None
            has_exited = info.si_code == os.CLD_EXITED
            _report(child.client, info.si_status if has_exited else -info.si_status)
            os.close(descriptor)
            return
        self._selector.unregister(descriptor)
        del self._children[descriptor]
        child.client.close()
        if self._children.pop(child.pidfd, None) is not None:  # it runs, but its client has gone
            self._selector.unregister(child.pidfd)
            os.close(child.pidfd)
            _kill_group(child.pid)
        os.waitpid(child.pid, 0)

    def _end(self) -> None:
        for child in {id(child): child for child in self._children.values()}.values():
            _kill_group(child.pid)

    def _close(self) -> None:
        """Closes all descriptors of the server in a forked process."""
        self._selector.close()
        self._control.close()
        for descriptor in self._children:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        for child in self._children.values():
            child.client.detach()


def _report(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the client has gone; its end of the socket tells that
        client.send(str(number).encode())


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _become(request: RunRequest, output: int, errors: int) -> None:
    """Gives a forked process the output, environment and title of the run."""
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    os.environ.clear()
    os.environ.update(request.environment)
    get_settings.cache_clear()
    sys.argv = [request.module, *request.arguments]
    _show_command_line([sys.executable, "-m", *sys.argv])
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _show_command_line(words: Sequence[str]) -> None:
    """Changes what `ps` and /proc show as the command line of this process.

    The kernel shows the memory that held the arguments. The client reserves enough of it with a
    last argument of spaces. A library for this is not used, because Celery would use it too.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = "\0".join(words).encode()[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def main() -> NoReturn:
    """Serves runs; in a forked process, performs the run and exits with its status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides when runs end
    request = ForkServer(socket.socket(fileno=int(sys.argv[1]))).serve()
    if request is None:
        sys.exit(0)
    sys.exit(importlib.import_module(request.module).main())


if __name__ == "__main__":
    main()
