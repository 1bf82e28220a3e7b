"""One server process that this process owns: its lock, its log, its data folder and its end. Linux only."""

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
    """A local service cannot start; the message says what is in the way."""


class Child:
    """One server process with its lock, its log and its data folder.

    Start it from a thread that lives as long as the owner: the kernel ends the server with that thread.
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
        """Ends the server in an orderly way and gives the folder free."""
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
        """Keeps a second owner out; the lock goes when this process does, so it is never stale."""
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
        libc = ctypes.CDLL(None, use_errno=True)
        parent, sign = os.getpid(), self.stop_signals[0]

        def die_with_parent() -> None:
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
                start_new_session=True,  # a terminal's Ctrl-C is for the owner, which drains first
                preexec_fn=die_with_parent,  # after the change of user, which would clear it; bound to this thread
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
        """Ends a server that a killed owner left behind; `folder` tells it from a reused process id."""
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
    """What a server may know of ours: nothing."""
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def works_in(pid: int, folder: Path) -> bool:
    """Whether the process lives and has `folder` as its working folder (a zombie has none)."""
    try:
        return pid > 0 and Path(f"/proc/{pid}/cwd").samefile(folder)
    except OSError:
        return False


def wait_until(is_done: Callable[[], bool], seconds: float) -> bool:
    """Polls until `is_done` or the time is over; says whether it is done."""
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def write_private(path: Path, text: str, owner: pwd.struct_passwd | None = None) -> None:
    """Replaces a file in one step; only its owner can read it."""
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    with open(handle, "w") as file:
        file.write(text)
    if owner is not None:
        os.chown(name, owner.pw_uid, owner.pw_gid)
    os.replace(name, path)


def unprivileged_user() -> pwd.struct_passwd:
    """The user that PostgreSQL runs as when we are root; the server refuses root itself."""
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise LocalServiceError(
        "PostgreSQL refuses to run as root and there is no user `postgres` or `nobody` to run it as"
    )


def can_traverse(path: Path, user: pwd.struct_passwd) -> bool:
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
    """The folder, made if need be; refused if another user could have prepared it."""
    path.mkdir(mode=0o755, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise LocalServiceError(f"{path} belongs to somebody else or is open to others; remove it")
    return path


def package_folder(name: str) -> Path:
    """Where a wheel lies, without running its code."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LocalServiceError(
            f"the package {name} is not installed; install it or set the service's URL"
        )
    return Path(spec.submodule_search_locations[0])
