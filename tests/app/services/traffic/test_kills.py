"""API processes that are killed while they store answers: what was spooled is stored once, and stays deleted."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psycopg
import pytest

from app.auth import SCOPES, create_key
from app.contracts.messages import ModelFacts
from app.db import models
from app.db.session import transaction
from app.local.embedded_servers import free_port
from app.settings import Settings
from app.storage import store
from tests.serve_worker import ROOT, WorkerProcess
from tests.waiting import wait_for

PROJECT = "acme"


class ApiProcess:
    """`stillhouse api`, which can be killed."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        with (folder / "api.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.commands.cli", "api"],
                cwd=ROOT,
                env=dict(os.environ) | {"STILLHOUSE_PORT": str(port)},
                stdout=log,
                stderr=log,
            )
        wait_for(self._is_ready, 60, f"the API did not start; see {folder / 'api.log'}")

    def _is_ready(self) -> bool:
        try:
            return bool(httpx.get(f"{self.url}/health/ready").json()["status"] == "ready")
        except httpx.TransportError:
            return False

    def stop(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(30)


@pytest.fixture
def start_api(
    database: str,
    valkey: str,
    tiny_llama_dir: Path,
    settings_env: Callable[..., Settings],
    tmp_path: Path,
) -> Iterator[Callable[[], ApiProcess]]:
    """Starts API processes one after the other, in one data folder and beside a serve worker."""
    crash_dir = tmp_path / "crash"
    crash_dir.mkdir()
    settings_env(key_pepper="pepper", crash_dir=crash_dir, serve_heartbeat_seconds=0.2)
    ref = store().put_folder(tiny_llama_dir, "models/tiny")
    facts = ModelFacts(
        architecture="llama", num_layers=4, hidden_size=64, vocab_size=384, context_tokens=256,
        num_parameters=1, tokenizer_sha256="", has_chat_template=True, weights_bytes=1,
        weights_sha256="",
    )  # fmt: skip
    with transaction() as session:
        models.insert_model(
            session, id="tiny", project_id=None, origin="imported", store_key=ref.key,
            bytes=ref.bytes, manifest_sha256=ref.sha256, facts=facts.model_dump(mode="json"),
        )  # fmt: skip
    worker = WorkerProcess(valkey, tmp_path / "worker.log")
    started: list[ApiProcess] = []

    def start() -> ApiProcess:
        started.append(ApiProcess(tmp_path))
        return started[-1]

    yield start
    for api in started:
        if api.process.poll() is None:
            api.stop()
    worker.close()


@pytest.fixture
def ask(database: str) -> Callable[..., list[str]]:
    with transaction() as session:
        key = create_key(session, PROJECT, scopes=SCOPES)

    def do_ask(api: ApiProcess, count: int) -> list[str]:
        with openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "What is a lantern?"}]
            return [
                client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=4, store=True
                ).id
                for _ in range(count)
            ]

    return do_ask


def stored_ids(database: str) -> list[str]:
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT id FROM stored_completions ORDER BY created_at")
        return [row[0] for row in rows]


def num_spooled(settings: Settings) -> int:
    segments = (settings.data_dir / "spool").glob("*/*.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in segments)


def test_spooled_answers_survive_kills_are_stored_once_and_stay_deleted(
    start_api: Callable[[], ApiProcess],
    ask: Callable[..., list[str]],
    database: str,
    settings_env: Callable[..., Settings],
) -> None:
    settings = settings_env()
    api = start_api()
    with psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE stored_completions IN EXCLUSIVE MODE")
        ids = ask(api, 4)  # not one of them waits for the database
        wait_for(lambda: num_spooled(settings) == 4, 5, "the answers are not spooled")
        api.stop()
    assert stored_ids(database) == []

    # The next process dies after the commit, before it notes that the records are inserted.
    crash = Path(settings.crash_dir) / "traffic.loaded"
    crash.touch()
    api = start_api()
    assert api.process.wait(30) == -signal.SIGKILL
    assert stored_ids(database) == ids
    with psycopg.connect(database) as connection:
        connection.execute("DELETE FROM stored_completions WHERE id = %s", (ids[1],))

    # Dies within the transaction: nothing of the batch may remain.
    api = start_api()
    wait_for(lambda: num_spooled(settings) == 0, 20, "the abandoned spool is not removed")
    (Path(settings.crash_dir) / "traffic.inserted").touch()
    (late,) = ask(api, 1)
    assert api.process.wait(30) == -signal.SIGKILL
    assert late not in stored_ids(database)

    api = start_api()
    wait_for(lambda: late in stored_ids(database), 20, "the spooled answer is not stored")
    assert stored_ids(database) == [ids[0], ids[2], ids[3], late]
    last = ask(api, 3)
    api.stop(signal.SIGTERM)
    assert stored_ids(database)[-3:] == last, "a shutdown does not store what is queued"
    assert list((settings.data_dir / "spool").iterdir()) == []
