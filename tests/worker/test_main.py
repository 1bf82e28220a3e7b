"""The worker process from its start to its end."""

import asyncio
import base64
import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import structlog
from celery.contrib.testing.worker import start_worker

from app.contracts.generation import GenerateRequest
from app.contracts.messages import ArtifactRef, serve_queue
from app.local.embedded_servers import LocalValkey, free_port
from app.routing.task_queue import NotSent, Outbox, notify_workers
from app.settings import get_settings
from tests.serve_worker import ROOT, WorkerProcess
from tests.waiting import wait_for
from worker.main import choose_device, make_app, queue_key
from worker.tasks import add_generate

NUM_RESTARTS = 5


class Process:
    """`python -m worker.main …` with its log in a file."""

    def __init__(self, role: str, log_path: Path) -> None:
        self.log_path = log_path
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "worker.main", role]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def wait_for_log(self, text: str, seconds: float = 30) -> None:
        wait_for(
            lambda: text in self.log_path.read_text(), seconds, f"no {text!r} in {self.log_path}"
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait(10)


def request(name: str) -> GenerateRequest:
    """A request for a model that is not in the store, from an API process that has ended."""
    weights = ArtifactRef(key="models/gone", bytes=1)
    deadline = time.time() + 600
    return GenerateRequest(
        id=name, reply_to="api", model="gone", weights=weights, text="x", deadline_at=deadline
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_train_worker_handles_wake_up_messages_and_ends_on_a_signal(
    database: str, valkey: str, tmp_path: Path, started: list[Process], number: int
) -> None:
    worker = Process("train", tmp_path / "log")
    started.append(worker)
    worker.wait_for_log("worker_ready")
    with redis.Redis.from_url(valkey) as client:
        assert notify_workers()
        wait_for(
            lambda: not client.llen("stillhouse:train"), 10, "the wake-up message was not handled"
        )
    assert worker.stop(number) == 0
    assert "Traceback" not in worker.log_path.read_text()


def test_a_worker_that_waits_for_redis_ends_when_told(
    settings_env: "object", monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[Process]
) -> None:
    monkeypatch.setenv("STILLHOUSE_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    worker = Process("train", tmp_path / "log")
    started.append(worker)
    worker.wait_for_log("Cannot connect")
    assert worker.stop() == 0


def test_a_serve_worker_survives_restarts_of_valkey_while_it_reads_requests(
    service_dir: Path, tmp_path: Path
) -> None:
    """Celery acknowledges a request a moment after it was read, perhaps on a lost connection."""
    is_over = threading.Event()
    with LocalValkey(service_dir / "restarts") as server:
        worker = WorkerProcess(server.url, tmp_path / "log")
        sender = threading.Thread(target=lambda: asyncio.run(send(server.url, worker.id, is_over)))
        try:
            sender.start()
            for _ in range(NUM_RESTARTS):
                time.sleep(3)
                server.stop()
                server.start()
                wait_for(
                    lambda: worker.process.poll() is not None or bool(worker.ids()),
                    20,
                    "no heartbeat after the restart",
                )
            time.sleep(3)  # the worker connects again two seconds after a loss
            assert worker.process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            assert worker.stop() == 0
        finally:
            is_over.set()
            sender.join()
            worker.close()


def test_requests_go_to_the_engine_from_the_thread_that_reads_them(valkey: str) -> None:
    """With a pool of threads, Celery would pause for up to a second when all of them are busy."""
    queue = serve_queue("reads")
    app = make_app(get_settings(), queue, no_ack=True)
    submitted: list[tuple[str, str]] = []

    def submit(request: GenerateRequest) -> None:
        submitted.append((request.id, threading.current_thread().name))

    add_generate(app, submit)

    async def send_all() -> None:
        outbox = Outbox(valkey)
        for number in range(100):
            await outbox.send("reads", request(str(number)))
        await outbox.aclose()

    with redis.Redis.from_url(valkey) as client:
        asyncio.run(send_all())
        ours = client.lindex(queue_key(app, queue), 0)
        client.rpush(queue_key(app, queue), with_unknown_field(ours))  # is read first
    options = {"pool": "threads", "concurrency": 1, "perform_ping_check": False}
    with structlog.testing.capture_logs() as lines, start_worker(app, **options):
        wait_for(lambda: len(submitted) == 100, 20, "requests stay in the queue")
    assert [name for name, _ in submitted] == [str(number) for number in range(100)]
    assert not [thread for _, thread in submitted if "ThreadPool" in thread]
    invalid = [line for line in lines if line["event"] == "message_invalid"]
    assert [line["fields"] for line in invalid] == [[("unknown",)]]
    assert "a prompt" not in repr(invalid)


def with_unknown_field(message: bytes) -> bytes:
    """Returns a request of a newer version, which this one cannot read."""
    changed = json.loads(message)
    body = json.loads(base64.b64decode(changed["body"]))
    body[0][0]["unknown"] = "a prompt"
    changed["body"] = base64.b64encode(json.dumps(body).encode()).decode()
    return json.dumps(changed).encode()


async def send(url: str, worker_id: str, is_over: threading.Event) -> None:
    """Sends requests until the event is set, also while the server is down."""
    outbox = Outbox(url)
    for number in itertools.count():
        if is_over.is_set():
            break
        with contextlib.suppress(NotSent):
            await outbox.send(worker_id, request(str(number)))
        await asyncio.sleep(0.001)
    await outbox.aclose()


def test_a_train_worker_never_pays_for_torch() -> None:
    code = "import sys, worker.main, worker.jobs.supervisor; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_an_unknown_role_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker.main", "cook"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"usage" in done.stderr


def test_the_engine_runs_on_a_card_where_there_is_one() -> None:
    assert choose_device("auto", has_cuda=True) == choose_device("cuda", has_cuda=True) == "cuda"
    assert choose_device("auto", has_cuda=False) == choose_device("cpu", has_cuda=True) == "cpu"
    with pytest.raises(SystemExit, match="STILLHOUSE_SERVE_DEVICE"):
        choose_device("cuda", has_cuda=False)


@pytest.mark.parametrize("role", ["train", "serve"])
def test_a_worker_that_is_given_a_device_that_is_not_there_says_so(
    monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    name = f"STILLHOUSE_{role.upper()}_CUDA_DEVICES"
    monkeypatch.setenv(name, "7000")
    command = [sys.executable, "-m", "worker.main", role]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert f"{name} is 7000" in done.stderr
