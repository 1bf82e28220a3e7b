"""The whole service as a user runs it: `stillhouse up` with its own Postgres, Valkey, API and workers."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob

from app.local.embedded_servers import free_port

TEACHER = "tiny-llama"
Json = dict[str, Any]  # Any: JSON bodies of the public API
FAST = {
    "STILLHOUSE_HEARTBEAT_SECONDS": "0.5",
    "STILLHOUSE_LEASE_SECONDS": "6",
    "STILLHOUSE_RECONCILE_SECONDS": "0.5",
    "STILLHOUSE_RING_AGAIN_SECONDS": "2",
    "STILLHOUSE_RETRY_BACKOFF_SECONDS": "0.5",
    "STILLHOUSE_MIN_FREE_BYTES": "1000000",
    "STILLHOUSE_NUM_THREADS": "1",
    "STILLHOUSE_SERVE_PRECISION": "float32",  # texts are compared with those of generate()
    "STILLHOUSE_MAX_CONTEXT_TOKENS": "256",
}


@dataclass
class Service:
    """One running `stillhouse up`."""

    data_dir: Path
    port: int
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return (self.data_dir / "api_key").read_text().strip()

    def client(self, key: str | None = None, *, max_retries: int = 2) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=max_retries
        )

    def cli(self, *words: str) -> str:
        """Run a `stillhouse` command against this service and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "app.commands.cli", *words],
            env={**self.environment, "STILLHOUSE_DATA_DIR": str(self.data_dir)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def new_key(self, project: str, *scopes: str) -> str:
        words = ["keys", "create", "--project", project]
        for scope in scopes:
            words += ["--scopes", scope]
        return self.cli(*words).split()[-1]

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes below this service whose command line holds all the words."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if all(word in line for word in words):
                found.append(child)
        return found

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


def start_service(data_dir: Path, **extra: str) -> Service:
    """Start the service on a free port and wait until it is ready."""
    data_dir.mkdir(parents=True, exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("STILLHOUSE_")}
    environment = {**inherited, **FAST, **extra}
    port = free_port()
    with (data_dir / "up.log").open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "app.commands.cli",
                "up",
                "--data-dir",
                str(data_dir),
                "--port",
                str(port),
            ],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    service = Service(data_dir, port, process, environment)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, (data_dir / "up.log").read_text()[-4000:]
        try:
            if httpx.get(f"{service.url}/health/ready", timeout=2).status_code == 200:
                return service
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    service.stop()
    raise AssertionError((data_dir / "up.log").read_text()[-4000:])


def estimate(client: openai.OpenAI, **body: Any) -> Json:
    """The estimate of a job that would be created with these arguments."""
    return client.post("/fine_tuning/jobs/estimate", body=body, cast_to=dict)


def assert_estimated(estimated: Json, job: FineTuningJob) -> None:
    """What was estimated is what the job needed: tokens and steps nearly, memory within a factor of 1.2.

    A tiny model needs less memory than the interpreter and its libraries, whose part differs by up to
    200 MiB between runs, so that much more is allowed.

    Time is compared by bench/estimates.py.
    """
    result = job.model_dump()["result"]
    entries = result.get("ladder") or [result]
    assert estimated["num_rows"] == result["num_train_rows"]
    assert estimated["num_tokens"] == pytest.approx(job.trained_tokens, rel=0.1)
    num_steps = sum(entry["num_planned_steps"] for entry in entries)
    assert estimated["num_steps"] == pytest.approx(num_steps, rel=0.1, abs=len(entries))
    memory_bytes = result["cost"]["peak_memory_bytes"]
    allowed_bytes = 0.2 * memory_bytes + 200 * 2**20
    difference_bytes = abs(estimated["peak_memory_bytes"] - memory_bytes)
    assert difference_bytes < allowed_bytes, (estimated, result["cost"])
