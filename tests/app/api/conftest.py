"""The whole API over real HTTP on a loopback port, and the stock client to drive it."""

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from app.auth import SCOPES, create_key
from app.contracts.messages import ModelFacts
from app.db import models
from app.db.session import transaction
from app.main import create_app
from app.settings import Settings
from app.storage import store
from tests.serve_worker import WorkerProcess
from tests.waiting import wait_for
from worker.models.model_facts import model_facts

START_SECONDS = 80
PROJECT = "acme"


class Service:
    """A running API and what tests do to it."""

    def __init__(self, url: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.url = url
        self.loop = loop

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Blocks the event loop during the block, as if the process were stopped."""
        is_blocked, is_over = threading.Event(), threading.Event()

        def wait() -> None:
            is_blocked.set()
            assert is_over.wait(START_SECONDS), "the block did not end"

        assert self.loop is not None
        self.loop.call_soon_threadsafe(wait)
        assert is_blocked.wait(START_SECONDS), "the event loop does not run"
        try:
            yield
        finally:
            is_over.set()

    def new_key(
        self, project_id: str = PROJECT, **options: Any
    ) -> str:  # Any: create_key's own options
        with transaction() as session:
            return create_key(session, project_id, **{"scopes": SCOPES, **options})

    def client(self, key: str | None = None, *, max_retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key or self.new_key(),
            max_retries=max_retries,
            timeout=20,
        )

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key or self.new_key()}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20)


@contextmanager
def running(settings: Settings, *, graceful_seconds: int = 3) -> Iterator[Service]:
    """Runs an API in a thread, until the block ends."""
    config = uvicorn.Config(
        create_app(settings),
        host="127.0.0.1",
        port=0,
        log_config=None,
        timeout_graceful_shutdown=graceful_seconds,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        assert thread.is_alive(), "the API did not start"
        assert time.monotonic() < deadline, "the API did not start in time"
        time.sleep(0.02)
    listener = server.servers[0]
    yield Service(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", listener.get_loop())
    server.should_exit = True
    thread.join(START_SECONDS)
    assert not thread.is_alive(), "the API did not stop"


@pytest.fixture
def service(database: str, valkey: str, settings_env: Callable[..., Settings]) -> Iterator[Service]:
    settings = settings_env(
        key_pepper="pepper", min_free_bytes=0, max_file_bytes=300_000, max_body_bytes=100_000
    )
    with running(settings) as made:
        yield made


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with service.client() as made:
        yield made


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as made:
        yield made


@pytest.fixture
def register(service: Service, tiny_llama_dir: Path) -> Callable[..., str]:
    """A function that registers the tiny model, or another folder, with facts that can be bent."""

    def do_register(
        name: str = "tiny",
        *,
        project_id: str | None = PROJECT,
        folder: Path = tiny_llama_dir,
        **changes: Any,
    ) -> str:
        facts = ModelFacts(
            architecture="llama",
            num_layers=4,
            hidden_size=64,
            vocab_size=384,
            context_tokens=256,
            num_parameters=100_000,
            tokenizer_sha256="t" * 64,
            has_chat_template=True,
            weights_bytes=400_000,
            weights_sha256="w" * 64,
        ).model_copy(update=changes)
        ref = store().put_folder(folder, f"models/{name}")
        with transaction() as session:
            models.insert_model(
                session,
                id=name,
                project_id=project_id,
                origin="imported",
                store_key=ref.key,
                bytes=ref.bytes,
                manifest_sha256=ref.sha256,
                facts=facts.model_dump(mode="json"),
            )
        return name

    return do_register


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Returns the status, the code and the parameter of an error in the form of the API."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


def jsonl(rows: Sequence[object]) -> io.BytesIO:
    return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture
def upload() -> Callable[..., str]:
    """A function that uploads rows and gives the file's id."""

    def do_upload(client: openai.OpenAI, rows: Sequence[object], **options: Any) -> str:
        return client.files.create(
            file=("rows.jsonl", jsonl(rows)), **{"purpose": "fine-tune", **options}
        ).id

    return do_upload


@pytest.fixture
def stranger(service: Service) -> Iterator[openai.OpenAI]:
    """A client with a key of another project."""
    with service.client(service.new_key("rival")) as made:
        yield made


@pytest.fixture(scope="module")
def shared_worker(
    valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WorkerProcess, Path]]:
    """A worker for all tests of a module, and the store it reads: starting one takes longer than what they ask."""
    folder = tmp_path_factory.mktemp("worker")
    settings = {
        "STORE_URL": str(folder / "store"),
        "SERVE_HEARTBEAT_SECONDS": "0.2",
        "NUM_THREADS": "1",
    }
    environment = {f"STILLHOUSE_{name}": value for name, value in settings.items()}
    worker = WorkerProcess(valkey_url, folder / "log", environment)
    yield worker, folder / "store"
    worker.close()


@pytest.fixture
def worker(
    shared_worker: tuple[WorkerProcess, Path],
    service: Service,
    settings_env: Callable[..., Settings],
    request: Any,
) -> WorkerProcess:
    """The worker, and the tiny model under the name `tiny`."""
    worker, store_folder = shared_worker
    settings_env(store_url=store_folder, serve_heartbeat_seconds=0.2)
    request.getfixturevalue("register")()
    wait_for(
        lambda: worker.id in worker.ids(), 5, "the fixture that empties Valkey took the heartbeat"
    )
    return worker


@pytest.fixture
def tool_model(worker: WorkerProcess, register: Callable[..., str], tool_model_dir: Path) -> str:
    """The model that calls a tool, under the name `caller`."""
    return register("caller", folder=tool_model_dir, **dict(model_facts(tool_model_dir)))
