"""A real serve worker process, and what its heartbeat says."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import redis

from app.contracts.control import ServeWorkerStatus
from app.contracts.messages import serve_worker_key
from tests.waiting import wait_for

START_SECONDS = 60
# as generate() writes, which texts are compared with
SAME_TEXT = {"STILLHOUSE_SERVE_PRECISION": "float32"}
ROOT = Path(__file__).resolve().parents[1]


class WorkerProcess:
    """`python -m worker.main serve`, ready for requests."""

    def __init__(
        self, valkey_url: str, log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._redis = redis.Redis.from_url(valkey_url)
        self._log_path, self._is_stopped = log_path, False
        before = self.ids()
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker.main", "serve"],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=SAME_TEXT
                | dict(os.environ)
                | {"STILLHOUSE_REDIS_URL": valkey_url}
                | dict(environment or {}),
            )
        wait_for(lambda: self.ids() - before, START_SECONDS, f"no heartbeat; its log is {log_path}")
        (self.id,) = self.ids() - before

    def ids(self) -> set[str]:
        return {
            ServeWorkerStatus.model_validate_json(value).worker_id
            for key in self._redis.scan_iter(match=serve_worker_key("*"))
            if (value := self._redis.get(key)) is not None
        }

    def status(self) -> ServeWorkerStatus:
        value = self._redis.get(serve_worker_key(self.id))
        assert isinstance(value, bytes), "the worker has no heartbeat"
        return ServeWorkerStatus.model_validate_json(value)

    def is_idle(self) -> bool:
        status = self.status()
        return not (status.num_running or status.num_waiting)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        self._is_stopped = True
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def close(self) -> None:
        """Kills the process. If it ended by itself, its log is shown beside the failure of the test."""
        if self.process.poll() is not None and not self._is_stopped:
            print(f"status {self.process.returncode}", self._log_path.read_text()[-8000:])
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._redis.close()
