"""The command `stillhouse doctor`: checks a deployment and gives advice for each failed check."""

import json
import secrets
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any, Literal

import httpx
from redis import Redis
from redis.exceptions import RedisError
from rich.console import Console

from app import auth
from app.contracts.control import ServeWorkerStatus
from app.contracts.messages import TRAIN_QUEUE, serve_worker_key
from app.db.health_checks import server_facts
from app.db.schema.migrate import revisions
from app.db.session import DatabaseUnavailable, PoolExhausted, transaction
from app.routing import task_queue
from app.routing.worker_registry import STALLED_SECONDS
from app.settings import Settings
from app.storage import StorageError, store

SKEW_SECONDS = 2.0  # much less than a lease; more means that NTP does not work
WAKE_UP_SECONDS = 3.0  # an idle train worker takes a wake-up message within milliseconds
KERNELS_SECONDS = 60.0  # mostly the import of torch
FAULTS = (
    DatabaseUnavailable,
    PoolExhausted,
    RedisError,
    OSError,
    StorageError,
    RuntimeError,
    httpx.HTTPError,
    subprocess.SubprocessError,
    ValueError,  # a response that is not from this service
    KeyError,
)


@dataclass(frozen=True)
class Finding:
    """Result of one check; `advice` is empty unless the check failed."""

    name: str
    status: Literal["ok", "fail"]
    what: str
    advice: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Runs all checks and returns their findings. A check that raises an error has failed."""
    findings: list[Finding] = []
    for name, check, advice in CHECKS:
        try:
            findings += check(settings)
        except FAULTS as fault:
            what = str(fault).partition("\n")[0][:200] or type(fault).__name__
            findings.append(Finding(name, "fail", what, advice))
    return findings


def report(findings: list[Finding], console: Console, *, is_json: bool) -> int:
    """Prints the findings and returns the exit status: 1 if a check failed, else 0."""
    is_sound = all(finding.status == "ok" for finding in findings)
    if is_json:
        print(
            json.dumps({"is_sound": is_sound, "findings": [asdict(f) for f in findings]}, indent=1)
        )
        return not is_sound
    for finding in findings:
        colour = "green" if finding.status == "ok" else "red"
        console.print(
            f"[{colour}]{finding.status:4}[/] {finding.name:12}", end=" ", highlight=False
        )
        console.print(finding.what, markup=False, highlight=False, soft_wrap=True)
        if finding.advice:
            console.print(f"     → {finding.advice}", markup=False, highlight=False, soft_wrap=True)
    return not is_sound


def judge(name: str, is_good: bool, what: str, advice: str) -> Finding:
    """Returns a finding, with the advice only if the check failed."""
    return Finding(name, "ok", what) if is_good else Finding(name, "fail", what, advice)


def database(settings: Settings) -> Iterator[Finding]:
    """Checks the database: connection, durability, clock and schema."""
    with transaction() as session:
        facts = server_facts(session)
        here = datetime.now(UTC)
    yield Finding("database", "ok", f"PostgreSQL {facts.version} answers")
    unsafe = "set fsync, synchronous_commit and full_page_writes to on: a power failure can lose accepted jobs"
    durable = "commits are durable" if facts.is_durable else "commits are not durable"
    yield judge("durability", facts.is_durable, durable, unsafe)
    skew = abs((facts.now - here).total_seconds())
    wrong = "run NTP (chrony, systemd-timesyncd) on this host and on the database host"
    what = f"the clocks of this host and the database differ by {skew:.1f} s"
    yield judge("clock", skew <= SKEW_SECONDS, what, wrong)
    current, newest = revisions(settings.database_url)
    what = f"at revision {current}; the newest is {newest}"
    yield judge("schema", current == newest, what, "run `stillhouse migrate`")


def broker(settings: Settings) -> Iterator[Finding]:
    """Checks the message broker: connection, eviction policy and persistence."""
    with _redis(settings) as client:
        facts: dict[str, Any] = client.info()  # Any: redis-py returns untyped values
        yield Finding(
            "broker", "ok", f"Redis-compatible server {facts.get('redis_version')} answers"
        )
        policy = facts.get("maxmemory_policy", "noeviction")
        keep = "set maxmemory-policy to noeviction: the broker must never evict messages"
        yield judge("eviction", policy == "noeviction", f"maxmemory-policy is {policy}", keep)
        is_saved = bool(facts.get("aof_enabled")) or facts.get("rdb_last_bgsave_status") == "ok"
        what = (
            "the append-only file is on"
            if facts.get("aof_enabled")
            else "the append-only file is off; it is not needed, because jobs are in PostgreSQL"
        )
        yield judge(
            "persistence",
            is_saved,
            what,
            "the broker cannot write its snapshot: check its log and its disk space",
        )


def files(settings: Settings) -> Iterator[Finding]:
    """Checks that the artifact store can write, read and delete, and has free disk space."""
    key, content = f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(1024)
    with store().writer(key) as writer:
        writer.write(content)
    try:
        with store().open(key) as reader:
            is_same = reader.read() == content
    finally:
        store().delete(key)
    what = (
        "can be written, read and deleted" if is_same else "returns other bytes than were written"
    )
    yield judge("store", is_same, f"{settings.store_root()} {what}", "check the disk or the bucket")
    free = store().free_bytes()
    if free is not None:
        what = f"{free / 2**30:.1f} GiB free, {settings.min_free_bytes / 2**30:.1f} must stay free"
        yield judge(
            "disk",
            free > settings.min_free_bytes,
            what,
            "delete files or models, or enlarge the volume",
        )


def workers(settings: Settings) -> Iterator[Finding]:
    """Checks that serve workers are alive, and that a train worker takes a wake-up message.

    A running job is also taken as proof of a train worker, because busy workers take no messages.
    """
    with _redis(settings) as client:
        beats = [
            value
            for key in client.scan_iter(serve_worker_key("*"))
            if isinstance(value := client.get(key), bytes)
        ]
        serving = [ServeWorkerStatus.model_validate_json(beat) for beat in beats]
        stalled = [
            worker.worker_id for worker in serving if worker.stalled_seconds > STALLED_SECONDS
        ]
        yield judge(
            "serving",
            bool(serving),
            f"{len(serving)} serve workers are running",
            "start `stillhouse serve-worker`",
        )
        if stalled:
            yield Finding(
                "serving",
                "fail",
                f"{', '.join(stalled)} has requests but makes no progress",
                "restart it; its log shows the reason",
            )
        task_queue.notify_workers()
        deadline = time.monotonic() + WAKE_UP_SECONDS
        while (
            is_unheard := bool(client.llen(task_queue.KEY_PREFIX + TRAIN_QUEUE))
        ) and time.monotonic() < deadline:
            time.sleep(0.05)
    with transaction() as session:
        num_running = server_facts(session).num_running
    listening = "no train worker is listening" if not num_running else "all train workers are busy"
    what = f"{num_running} jobs are running; " + (
        listening if is_unheard else "a train worker is listening"
    )
    yield judge(
        "training", not is_unheard or num_running > 0, what, "start `stillhouse train-worker`"
    )


def api(settings: Settings) -> Iterator[Finding]:
    """Checks that the API is ready."""
    url = f"http://{settings.host}:{settings.port}"
    answer = httpx.get(f"{url}/health/ready", timeout=5, trust_env=False)
    what = f"{url} is {answer.json()['status']}"
    yield judge("api", answer.status_code == 200, what, "its log shows the reason")


def gpu(settings: Settings) -> Iterator[Finding]:
    """Checks that the NVIDIA driver, if there is one on this host, finds a GPU."""
    if shutil.which("nvidia-smi") is None:
        yield Finding("gpu", "ok", "no NVIDIA driver found; workers on this host use the CPU")
        return
    listed = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=20
    )
    cards = [
        line.partition(" (UUID")[0] for line in listed.stdout.splitlines() if line.startswith("GPU")
    ]
    broken = "run `nvidia-smi` to check the driver; a container must be started with GPU access"
    yield judge("gpu", bool(cards), "; ".join(cards) or "no GPU found", broken)


def cpu_kernels(settings: Settings) -> Iterator[Finding]:
    """Reports whether workers on this host have C kernels for the CPU, or else why not.

    A missing library is no failure: it is built later, or PyTorch operations are used.
    """
    if find_spec("worker") is None or find_spec("torch") is None:
        yield Finding("kernels", "ok", "the worker package is not installed on this host")
        return
    shown = subprocess.run(
        [sys.executable, "-m", "worker.build_kernels", "--status"],
        capture_output=True,
        text=True,
        check=False,
        timeout=KERNELS_SECONDS,
    )
    what = (shown.stdout or shown.stderr).strip().splitlines()
    advice = "run `stillhouse kernels build` and fix the error that it prints"
    yield judge("kernels", shown.returncode == 0, what[-1] if what else "no output", advice)


def keys(settings: Settings) -> Iterator[Finding]:
    """Checks that there is a pepper, and that only their owner can access the secret files."""
    auth.key_pepper(settings)
    for path in (settings.data_dir / name for name in ("pepper", "api_key", "service.json")):
        if path.exists():
            mode = stat.S_IMODE(path.stat().st_mode)
            yield judge(
                "key files",
                not mode & 0o077,
                f"{path} has mode {mode:o}",
                f"run `chmod 600 {path}`",
            )


def _redis(settings: Settings) -> Redis:
    return Redis.from_url(settings.redis_url, socket_timeout=3, socket_connect_timeout=3)


Check = Callable[[Settings], Iterator[Finding]]
CHECKS: tuple[tuple[str, Check, str], ...] = (
    ("database", database, "start PostgreSQL, or correct STILLHOUSE_DATABASE_URL"),
    (
        "broker",
        broker,
        "start Valkey or Redis, or correct STILLHOUSE_REDIS_URL; jobs are accepted meanwhile, and nothing is lost",
    ),
    ("store", files, "make the store writable for this user, or correct STILLHOUSE_STORE_URL"),
    ("workers", workers, "check the broker and the database first; this check needs both"),
    ("api", api, "start `stillhouse api`, or correct STILLHOUSE_HOST and STILLHOUSE_PORT"),
    ("gpu", gpu, "run `nvidia-smi` and fix the error that it prints"),
    ("kernels", cpu_kernels, "run `stillhouse kernels build`"),
    (
        "key files",
        keys,
        "set STILLHOUSE_KEY_PEPPER, or give the data folder of `stillhouse up` with --data-dir",
    ),
)
