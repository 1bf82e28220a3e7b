"""The whole service as processes of its own, with a proxy in every link: what the faults are done to."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit, urlunsplit

import httpx
import psutil
import psycopg
import redis

from app.local.embedded_servers import LocalPostgres, LocalValkey, free_port
from app.parent_death import tethered
from tests.faults.proxy import Network
from worker.jobs import run_specs

ROOT: Final = Path(__file__).resolve().parents[2]
TEACHER: Final = "tiny-llama"
LEASE_SECONDS: Final = 6.0
SETTINGS: Final = {
    "HEARTBEAT_SECONDS": "0.5",
    "LEASE_SECONDS": str(LEASE_SECONDS),
    "RECONCILE_SECONDS": "0.5",
    "RING_AGAIN_SECONDS": "2",
    "RETRY_BACKOFF_SECONDS": "0.05",
    "MAX_LOSSES": "100",  # a fault may cost a run, never the job
    "MAX_ACTIVE_JOBS_PER_PROJECT": "100000",
    "MAX_FILES_PER_PROJECT": "100000",
    "MIN_FREE_BYTES": "1000000",
    "NUM_THREADS": "1",
    "MAX_CONTEXT_TOKENS": "256",
    "RESIDENT_MODEL_BYTES": "100000000",
}
START_SECONDS: Final = 120.0


@dataclass
class Program:
    """One process that is started again whenever it dies, as a process manager would."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    num_starts: int = 0
    is_wanted: bool = True

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                tethered(self.command),
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.num_starts += 1

    def send(self, number: signal.Signals) -> bool:
        """Whether there was a process to send it to."""
        process = self.process
        if process is None or process.poll() is not None:
            return False
        process.send_signal(number)
        return True

    def run_process(self) -> psutil.Process | None:
        """The run (trainer or import) that a train worker has started, once it is past its own start-up."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.pid).children(recursive=True):
                if set(child.cmdline()) & set(run_specs.MODULES.values()):
                    return child
        return None


class Keeper(threading.Thread):
    """Starts the programs: each dies with the thread that started it, so that thread is this one."""

    def __init__(self, programs: Mapping[str, Program]) -> None:
        super().__init__(name="keeper", daemon=True)
        self._programs = programs
        self._is_over = threading.Event()
        self.faults: queue.Queue[BaseException] = queue.Queue()

    def run(self) -> None:
        while not self._is_over.wait(0.05):
            for program in self._programs.values():
                if program.is_wanted and not program.is_running:
                    try:
                        program.start()
                    except OSError as error:
                        self.faults.put(error)
        for program in self._programs.values():
            if program.process is not None and program.process.poll() is None:
                program.process.send_signal(signal.SIGCONT)
                program.process.kill()
                program.process.wait(20)

    def stop(self) -> None:
        self._is_over.set()
        self.join(60)


@dataclass
class System:
    """Postgres, Valkey, two APIs, two train workers and two serve workers. Use it as a context manager.

    Links are named `who-whom`; each of `api`, `train` and `serve` reaches its databases through its own.
    """

    folder: Path
    num_train: int = 2
    num_serve: int = 2
    num_api: int = 2
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = Network()
        self.programs: dict[str, Program] = {}
        self.keeper = Keeper(self.programs)
        self.postgres = LocalPostgres(
            self.folder / "postgres-data", tcp_port=free_port(), options=("max_connections=200",)
        )
        self.valkey = LocalValkey(self.folder / "valkey-data")
        self.data_dir = self.folder / "data"
        self.crash_dir = self.folder / "crash"
        self.key = self.admin_key = ""

    def __enter__(self) -> Self:
        for folder in (self.data_dir, self.crash_dir):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.keeper.is_alive():
            self.keeper.stop()
        self.valkey.stop()
        self.postgres.stop()
        self.network.close()

    @property
    def api_urls(self) -> list[str]:
        """Of each API, through the client's link."""
        return [
            f"http://127.0.0.1:{self.network.links[f'client-api-{i}'].port}"
            for i in range(1, self.num_api + 1)
        ]

    def named(self, role: str) -> list[Program]:
        return [program for name, program in self.programs.items() if name.startswith(role)]

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        """Past the proxies, for the checker."""
        return psycopg.connect(self.postgres.url, autocommit=True)

    def start_valkey(self) -> None:
        """Starts it empty and without an append-only file: what it knew is gone with it."""
        for path in (self.valkey.folder / "appendonlydir").glob("*"):
            path.unlink()
        self.valkey.start()
        with self.valkey_client() as client:
            client.config_set("appendonly", "no")

    def valkey_client(self) -> "redis.Redis":
        return redis.Redis.from_url(self.valkey.url)

    def kill_valkey(self) -> None:
        assert self.valkey.process is not None
        self.valkey.process.kill()
        self.valkey.process.wait(20)

    def stop_postgres(self) -> None:
        """As `pg_ctl stop -m immediate` does: no checkpoint, the next start recovers from the log."""
        assert self.postgres.process is not None
        self.postgres.process.send_signal(signal.SIGQUIT)
        self.postgres.process.wait(30)

    def arm(self, point: str, word: str = "KILL") -> Path:
        """Arms a crash point; the file is gone once a process has passed it."""
        path = self.crash_dir / point
        path.write_text(word)
        return path

    def is_ready(self, url: str) -> bool:
        try:
            return httpx.get(f"{url}/health/ready", timeout=2, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def add(self, name: str, words: list[str], **environment: str) -> Program:
        program = Program(
            name,
            [sys.executable, "-m", *words],
            self._environment(**environment),
            self.folder / f"{name}.log",
        )
        self.programs[name] = program
        return program

    def add_train_worker(self, name: str) -> Program:
        return self.add(name, ["worker.main", "train"], **self._urls("train"))

    def cli(self, *words: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "app.commands.cli", *words],
            cwd=ROOT,
            env=self._environment(**environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _start(self) -> None:
        self.postgres.start()
        self.start_valkey()
        for who in ("api", "train", "serve"):
            self.network.add(f"{who}-postgres", self.postgres.port)
            self.network.add(f"{who}-valkey", urlsplit(self.valkey.url).port or 0)
        direct = {"DATABASE_URL": self.postgres.tcp_url, "REDIS_URL": self.valkey.url}
        self.cli("migrate", **direct)
        new_key = ("keys", "create", "--project", "faults")
        self.key = self.cli(*new_key, **direct).split()[-1]
        self.admin_key = self.cli(*new_key, "--scopes", "admin", **direct).split()[-1]
        for i in range(1, self.num_api + 1):
            port = free_port()
            self.network.add(f"client-api-{i}", port)
            self.add(f"api-{i}", ["app.commands.cli", "api"], PORT=str(port), **self._urls("api"))
        for i in range(1, self.num_train + 1):
            self.add_train_worker(f"train-{i}")
        for i in range(1, self.num_serve + 1):
            self.add(f"serve-{i}", ["worker.main", "serve"], **self._urls("serve"))
        self.keeper.start()
        for url in self.api_urls:
            wait_until(partial(self.is_ready, url), START_SECONDS, f"no API answers at {url}")
        teacher = self._make_teacher()
        self.cli("models", "import", str(teacher), "--name", TEACHER, **direct)

    def _make_teacher(self) -> Path:
        folder = self.folder / "teacher"
        code = (
            "import sys; from pathlib import Path; from tests.tiny import save_tiny;"
            "save_tiny(Path(sys.argv[1]), 'llama')"
        )
        subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, timeout=600)
        return folder

    def _urls(self, who: str) -> dict[str, str]:
        return {
            "DATABASE_URL": through(
                self.postgres.tcp_url, self.network.links[f"{who}-postgres"].port
            ),
            "REDIS_URL": through(self.valkey.url, self.network.links[f"{who}-valkey"].port),
        }

    def _environment(self, **values: str) -> dict[str, str]:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")
        }
        mine = {
            **SETTINGS,
            "DATA_DIR": str(self.data_dir),
            "CRASH_DIR": str(self.crash_dir),
            **self.extra,
            **values,
        }
        return clean | {f"STILLHOUSE_{name}": value for name, value in mine.items()}


def through(url: str, port: int) -> str:
    """The same URL by way of another port of this machine."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{port}"))


def wait_until(is_so: Callable[[], object], seconds: float, why: str) -> float:
    """Polls; gives the seconds it took. Fails with the reason when the time is up."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > seconds:
            raise AssertionError(why)
        time.sleep(0.05)
    return time.monotonic() - began
