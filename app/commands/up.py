"""The command `stillhouse up`: runs the whole service, with its databases, until Ctrl-C."""

import contextlib
import fcntl
import importlib.util
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from app import auth
from app.commands.remote_service import local_url
from app.commands.startup import Startup
from app.db.schema.migrate import upgrade
from app.db.session import engine, transaction
from app.errors import Unauthenticated
from app.local.embedded_servers import LocalPostgres, LocalValkey, remove_service, write_service
from app.local.process_manager import Kept, set_environment, stop_all
from app.local.server_process import Child, LocalServiceError, write_private
from app.settings import Settings, get_settings

DRAIN_SECONDS = 90.0  # a trainer gets 60 s to write its checkpoint
TURN_SECONDS = 0.2


@dataclass(frozen=True)
class UpOptions:
    """Options of `stillhouse up`; `train_workers` and `serve_workers` are numbers of processes."""

    data_dir: Path
    host: str
    port: int
    train_workers: int
    serve_workers: int


class Stop:
    """Counts SIGINT, SIGTERM and SIGHUP: the first one drains, the second one kills."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    @property
    def is_asked(self) -> bool:
        return self.count > 0

    @property
    def is_urgent(self) -> bool:
        return self.count > 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def run_up(options: UpOptions, console: Console) -> None:
    """Starts the service, keeps it running until a signal arrives, and drains it.

    Prints the URL when the API answers and a worker of each role is ready. Raises LocalServiceError
    if the service cannot start.
    """
    _demand_worker_packages(options)
    _demand_free_port(options)
    stop = Stop()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_one(options.data_dir))
        databases = _start_databases(stack, options, console)
        settings = get_settings()
        upgrade(settings.database_url)
        auth.ensure_pepper(settings)
        key_path = _ensure_api_key(settings)
        write_service(settings.data_dir, _service_environment(settings))
        stack.callback(remove_service, settings.data_dir)
        stack.callback(engine().dispose)
        kept = _processes(options)
        stack.callback(_drain, kept, stop, console)
        for process in kept:
            process.start()
        startup: Startup | None = _startup(options, kept, console)
        while not stop.is_asked:
            if startup is not None and startup.is_complete():
                startup = None
                _greet(options, key_path, console)
            for database in databases:
                if not database.is_running():
                    _say(console, f"{database.name} has exited and is being restarted")
                    database.start()
            for process in kept:
                process.keep(lambda text: _say(console, text))
            time.sleep(TURN_SECONDS)


def _start_databases(
    stack: contextlib.ExitStack, options: UpOptions, console: Console
) -> list[Child]:
    """Starts Postgres and Valkey unless the settings have their URLs, and sets the variables."""
    settings = get_settings()
    databases: list[Child] = []
    environment = {
        "STILLHOUSE_DATA_DIR": str(options.data_dir),
        "STILLHOUSE_HOST": options.host,
        "STILLHOUSE_PORT": str(options.port),
    }
    if not settings.database_url:
        console.print(f"Starting PostgreSQL in {options.data_dir}", highlight=False, soft_wrap=True)
        postgres = stack.enter_context(LocalPostgres(options.data_dir))
        environment["STILLHOUSE_DATABASE_URL"] = postgres.url
        databases.append(postgres)
    if not settings.redis_url:
        console.print(f"Starting Valkey in {options.data_dir}", highlight=False, soft_wrap=True)
        valkey = stack.enter_context(LocalValkey(options.data_dir))
        environment["STILLHOUSE_REDIS_URL"] = valkey.url
        databases.append(valkey)
    set_environment(environment)
    return databases


def _processes(options: UpOptions) -> list[Kept]:
    """Returns the processes in this order: the API, the train workers, the serve workers."""
    logs, settings = options.data_dir / "logs", get_settings()
    kept = [Kept("api", [sys.executable, "-m", "app.commands.cli", "api"], logs)]
    for role, count, devices in (
        ("train", options.train_workers, settings.train_cuda_devices),
        ("serve", options.serve_workers, settings.serve_cuda_devices),
    ):
        command, setting = (
            [sys.executable, "-m", "worker.main", role],
            f"STILLHOUSE_{role.upper()}_CUDA_DEVICES",
        )
        for i in range(count):
            environment = {setting: cuda_share(devices, i, count)}
            name = f"{role}-worker-{i + 1}"
            kept.append(Kept(name, command, logs, announces=True, environment=environment))
    return kept


def cuda_share(devices: str, number: int, count: int) -> str:
    """Returns the CUDA devices of the worker `number` of `count`.

    Workers get equal parts of the list. If there are fewer devices than workers, each worker gets
    one device, which it may share.
    """
    listed = devices.split(",")
    if len(listed) < count:
        return listed[number % len(listed)]
    return ",".join(listed[number * len(listed) // count : (number + 1) * len(listed) // count])


def _service_environment(settings: Settings) -> dict[str, str]:
    return {
        "STILLHOUSE_DATABASE_URL": settings.database_url,
        "STILLHOUSE_REDIS_URL": settings.redis_url,
        "STILLHOUSE_STORE_URL": settings.store_root(),
        "STILLHOUSE_HOST": settings.host,
        "STILLHOUSE_PORT": str(settings.port),
    }


def _ensure_api_key(settings: Settings) -> Path:
    """Returns the path of the operator's API key: <data-dir>/api_key, with mode 600.

    Creates a key with all scopes for the project `default` if there is no valid one.
    """
    path = settings.data_dir / "api_key"
    if path.exists():
        with contextlib.suppress(Unauthenticated):
            auth.authenticate(f"Bearer {path.read_text().strip()}")
            return path
    with transaction() as session:
        key = auth.create_key(session, "default", scopes=auth.SCOPES)
    write_private(path, key + "\n")
    return path


def _startup(options: UpOptions, kept: list[Kept], console: Console) -> Startup:
    api, *workers = kept
    num_train = options.train_workers
    by_role = {"train": workers[:num_train], "serve": workers[num_train:]}
    _say(console, f"Starting the API, {num_train} train and {options.serve_workers} serve workers")
    return Startup(
        local_url(options.host, options.port), api, by_role, lambda text: _say(console, text)
    )


def _greet(options: UpOptions, key_path: Path, console: Console) -> None:
    url = local_url(options.host, options.port)
    lines = (
        f"\n[bold]Stillhouse is up at {url}[/bold]",
        f"  API key  {key_path}",
        f"  browser  open {url} and sign in with the API key",
        f"  logs     {options.data_dir / 'logs'}",
        f'  try      curl {url}/v1/models -H "Authorization: Bearer $(cat {key_path})"',
        "Ctrl-C drains and stops everything; a second Ctrl-C does not wait.\n",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _drain(kept: list[Kept], stop: Stop, console: Console) -> None:
    console.print("Draining: running jobs write a checkpoint and continue at the next start")
    killed = stop_all(kept, grace_seconds=DRAIN_SECONDS, is_urgent=lambda: stop.is_urgent)
    for name in killed:
        _say(console, f"{name} did not stop in time and was killed")
    console.print("Stopped")


def _say(console: Console, text: str) -> None:
    console.print(
        f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True
    )


def _demand_worker_packages(options: UpOptions) -> None:
    if (options.train_workers or options.serve_workers) and importlib.util.find_spec(
        "torch"
    ) is None:
        raise LocalServiceError(
            "workers need PyTorch: pip install 'stillhouse[worker]', or use --train-workers 0 --serve-workers 0"
        )


def _demand_free_port(options: UpOptions) -> None:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise LocalServiceError(
                f"cannot listen on {options.host}:{options.port} ({error.strerror}); choose another --host or --port"
            ) from error


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Locks the data folder against a second `up`. Raises LocalServiceError if it is locked."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalServiceError(
                f"another `stillhouse up` is running in {data_dir}; stop it first"
            ) from None
        yield
