"""Base class and helpers for a server that runs as a child process. Linux only."""

import ctypes
import fcntl
import importlib.util
import logging
import os
import pwd
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final, Self

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG: Final = 1


class LocalServiceError(Exception):
    """A local service cannot start or stop; the message gives the reason."""


class Child:
    """Server process with a lock, a log file and a data folder.

    Start it from a thread that lives as long as this process. When that thread ends, the kernel
    sends the first of `stop_signals` to the server.
    """

    name: str
    stop_signals: tuple[signal.Signals, ...]

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.resolve()
        self.process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log_path(self) -> Path:
        return self.data_dir / f"{self.name}.log"

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> str:
        raise NotImplementedError

    def stop(self) -> None:
        """Stops the server and releases the lock.

        Sends each of `stop_signals` and at last SIGKILL, and waits 20 s after each.
        """
        if self.process is not None:
            for sign in (*self.stop_signals, signal.SIGKILL):
                if self.process.poll() is not None:
                    break
                self.process.send_signal(sign)
                try:
                    self.process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    continue
            self.process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def take_lock(self) -> None:
        """Locks the data folder against other owners. Raises LocalServiceError if it is locked.

        The kernel releases the lock when this process ends, so a lock is never stale.
        """
        if self._lock is not None:
            return
        self.data_dir.mkdir(parents=True, exist_ok=True)
        lock = (self.data_dir / f"{self.name}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise LocalServiceError(
                f"another process already runs {self.name} in {self.data_dir}; stop it or choose another data folder"
            ) from None
        self._lock = lock

    def spawn(
        self,
        arguments: Sequence[str | Path],
        folder: Path,
        user: pwd.struct_passwd | None,
        config: bytes = b"",
    ) -> subprocess.Popen[bytes]:
        """Starts the server in `folder`, as `user` if given, with `config` on standard input."""
        libc = ctypes.CDLL(None, use_errno=True)
        parent, sign = os.getpid(), self.stop_signals[0]

        def die_with_parent() -> None:
            """Asks the kernel to send `sign` to the server when the starting thread ends."""
            libc.prctl(PR_SET_PDEATHSIG, sign)
            if os.getppid() != parent:
                os._exit(1)

        with self.log_path.open("ab") as output:
            process = subprocess.Popen(
                [str(argument) for argument in arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=server_environment(),
                start_new_session=True,  # Ctrl-C reaches only the owner, which drains first
                # Runs after the change of user, which would clear the parent-death signal.
                preexec_fn=die_with_parent,
                user=user.pw_uid if user else None,
                group=user.pw_gid if user else None,
                extra_groups=[] if user else None,
            )
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(config)
        return process

    def log_tail(self) -> str:
        return (
            self.log_path.read_text(errors="replace")[-800:]
            if self.log_path.exists()
            else "(no log)"
        )

    def stop_leftover(self, pid: int, folder: Path) -> None:
        """Stops a server that a killed owner has left running.

        Its working folder must be `folder`, because the process id may have been reused. Raises
        LocalServiceError if the server does not stop.
        """
        for sign in (*self.stop_signals, signal.SIGKILL):
            if not works_in(pid, folder):
                return
            log.warning("stopping a leftover %s (process %s) of %s", self.name, pid, self.data_dir)
            os.kill(pid, sign)
            wait_until(lambda: not works_in(pid, folder), 20)
        if works_in(pid, folder):
            raise LocalServiceError(
                f"process {pid} still uses {folder} and cannot be stopped; stop it by hand"
            )


def server_environment() -> dict[str, str]:
    """Returns the environment of a server, which inherits no variable of this process."""
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def works_in(pid: int, folder: Path) -> bool:
    """Returns whether the process is running and has `folder` as its working folder.

    A process that has ended but has not been waited for has no working folder.
    """
    try:
        return pid > 0 and Path(f"/proc/{pid}/cwd").samefile(folder)
    except OSError:
        return False


def wait_until(is_done: Callable[[], bool], seconds: float) -> bool:
    """Polls until `is_done` returns True or the time is over. Returns False after a timeout."""
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def write_private(path: Path, text: str, owner: pwd.struct_passwd | None = None) -> None:
    """Writes or replaces a file atomically; only its owner can read it."""
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    with open(handle, "w") as file:
        file.write(text)
    if owner is not None:
        os.chown(name, owner.pw_uid, owner.pw_gid)
    os.replace(name, path)


def unprivileged_user() -> pwd.struct_passwd:
    """Returns the user for PostgreSQL when this process runs as root, which the server refuses.

    Raises LocalServiceError if there is no suitable user.
    """
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise LocalServiceError(
        "PostgreSQL refuses to run as root and there is no user `postgres` or `nobody` to run it as"
    )


def can_traverse(path: Path, user: pwd.struct_passwd) -> bool:
    """Returns whether the user may enter the folder and all its parents, by their mode bits.

    Of the user's groups, only the primary one is considered.
    """
    for folder in (path, *path.parents):
        status = folder.stat()
        if status.st_uid == user.pw_uid:
            needed = stat.S_IXUSR
        elif status.st_gid == user.pw_gid:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not status.st_mode & needed:
            return False
    return True


def own_folder(path: Path) -> Path:
    """Creates the folder if it does not exist, and returns it.

    Raises LocalServiceError if another user owns the folder or may write to it.
    """
    path.mkdir(mode=0o755, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise LocalServiceError(
            f"{path} is owned by another user, or others can write to it; remove it"
        )
    return path


def package_folder(name: str) -> Path:
    """Returns the folder of a package without importing it. Raises LocalServiceError if missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LocalServiceError(
            f"the package {name} is not installed; install it or set the service's URL"
        )
    return Path(spec.submodule_search_locations[0])
