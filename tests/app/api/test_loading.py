"""A model that is loading, seen by clients who do not wait for it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests.serve_worker import WorkerProcess
from tests.waiting import wait_for


@pytest.fixture
def impatient_worker(
    valkey: str, settings_env: Callable[..., Settings], tmp_path: Path
) -> Iterator[WorkerProcess]:
    """A worker whose requests wait for no load."""
    settings_env(serve_heartbeat_seconds=0.2, num_threads=1, model_load_wait_seconds=0)
    worker = WorkerProcess(valkey, tmp_path / "worker.log")
    yield worker
    worker.close()


def test_a_load_outlives_the_client_that_was_told_to_come_again(
    impatient_worker: WorkerProcess, http: httpx.Client, register: Callable[..., str]
) -> None:
    register("tiny")
    body = {"model": "tiny", "prompt": "lamp", "max_tokens": 2}
    refused = http.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    wait_for(
        lambda: impatient_worker.status().resident, 30, "the load was given up with the client"
    )
    assert http.post("/v1/completions", json=body).status_code == 200
