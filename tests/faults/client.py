"""The client's side: submits jobs, tries again until they are accepted, and writes down what it was told."""

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx

from tests.faults.system import TEACHER, System

ACCEPT_SECONDS: Final = 60.0
TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
Json = dict[str, Any]  # Any: JSON bodies of the public API
# 1000 epochs are most: of few rows they were over in 20 minutes
NUM_ROWS: Final = {
    "kept": 16,
    "many": 800,
}
FILES: Final = {"short": "gone", "long": "many"}


@dataclass(frozen=True)
class Accepted:
    """What a 200 promised. `expected` are the states that the job may end in."""

    key: str
    job_id: str
    expected: tuple[str, ...]


class Ledger:
    """An append-only file of every request that was made and every one that was accepted."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lock = threading.Lock()
        self.asked: set[str] = set()
        self.accepted: list[Accepted] = []
        self.contradictions: list[str] = []  # one key, two jobs

    def close(self) -> None:
        self._file.close()

    def ask(self, key: str) -> None:
        self._write("asked", key)
        self.asked.add(key)

    def accept(self, accepted: Accepted) -> None:
        self._write("accepted", accepted.key, accepted.job_id)
        with self._lock:
            for known in self.accepted:
                if known.key == accepted.key:
                    if known.job_id != accepted.job_id:
                        self.contradictions.append(accepted.key)
                    return
            self.accepted.append(accepted)

    def expect(self, job_id: str, *states: str) -> None:
        """Changes what the job may end in, for it was cancelled."""
        with self._lock:
            self.accepted = [
                Accepted(known.key, known.job_id, states) if known.job_id == job_id else known
                for known in self.accepted
            ]

    def _write(self, *words: str) -> None:
        with self._lock:
            self._file.write(json.dumps([time.time(), *words]) + "\n")
            self._file.flush()


class Client:
    """One user with one key, two APIs to choose from, and patience."""

    def __init__(self, system: System, ledger: Ledger, rng: random.Random) -> None:
        self.system, self.ledger = system, ledger
        self._rng = rng
        self._numbers: Iterator[int] = itertools.count()
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {system.key}"},
            timeout=10,
            trust_env=False,
            limits=httpx.Limits(max_connections=200),
        )
        self._run = uuid4().hex[:8]
        self._files: dict[str, str] = {}

    def close(self) -> None:
        self._http.close()

    def new_key(self, label: str) -> str:
        return f"{label}-{self._run}-{next(self._numbers)}"

    def submit(
        self, kind: str, *, key: str | None = None, seconds: float = ACCEPT_SECONDS
    ) -> Accepted:
        """Asks until a 200 comes. Kinds: `trained`, `long` (trains until told otherwise) and `short`.

        A short job's training file is gone from the store: it is claimed, and fails for good, without a trainer.
        Raises AssertionError if nobody accepts in time.
        """
        key = key or self.new_key(kind)
        self.ledger.ask(key)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.post_job(kind, key)
            if answer is not None and answer.status_code == 200:
                expected = ("failed",) if kind == "short" else ("succeeded",)
                accepted = Accepted(key, answer.json()["id"], expected)
                self.ledger.accept(accepted)
                return accepted
            assert answer is None or answer.status_code in {409, 429, 500, 502, 503}, answer.text
            time.sleep(0.1)
        raise AssertionError(f"no API accepts jobs: {answer.text if answer else 'no answer'}")

    def post_job(
        self, kind: str, key: str, **changes: Any
    ) -> httpx.Response | None:  # Any: JSON of the body
        return self.call(
            "POST",
            "/v1/fine_tuning/jobs",
            json={**self._job(kind, key), **changes},
            headers={"Idempotency-Key": key},
        )

    def call(
        self, method: str, path: str, **options: Any
    ) -> httpx.Response | None:  # Any: httpx's own
        """One request to either API; None if no answer came."""
        try:
            return self._http.request(
                method, self._rng.choice(self.system.api_urls) + path, **options
            )
        except httpx.TransportError:
            return None

    def status(self, job_id: str) -> str | None:
        answer = self.call("GET", f"/v1/fine_tuning/jobs/{job_id}")
        return answer.json()["status"] if answer is not None and answer.status_code == 200 else None

    def command(self, job_id: str, verb: str, seconds: float = ACCEPT_SECONDS) -> int:
        """Posts cancel, pause or resume until an answer comes; gives its status."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.call("POST", f"/v1/fine_tuning/jobs/{job_id}/{verb}")
            if answer is not None and answer.status_code < 500:
                return answer.status_code
            time.sleep(0.1)
        raise AssertionError(f"{verb} is not answered")

    def prepare(self) -> None:
        """Uploads the training files while nothing is broken yet."""
        for kind in ("kept", "many", "gone"):
            answer = self.call(
                "POST",
                "/v1/files",
                files={
                    "file": (
                        f"{kind}.jsonl",
                        _rows(NUM_ROWS[kind])
                        if kind in NUM_ROWS
                        else b'{"prompt": "a", "completion": "b"}\n',
                    )
                },
                data={"purpose": "fine-tune"},
            )
            assert answer is not None, "no answer to an upload"
            assert answer.status_code == 200, answer.text
            self._files[kind] = answer.json()["id"]
        (self.system.data_dir / "store" / "files" / self._files["gone"]).unlink()

    def _job(self, kind: str, key: str) -> Json:
        hyperparameters: Json = {
            "n_epochs": 2,
            "max_steps": 6,
            "batch_tokens": 64,
            "max_sequence_tokens": 64,
            "eval_steps": 100_000,
            "checkpoint_steps": 2,
        }
        if kind == "long":
            hyperparameters |= {"n_epochs": 1000, "max_steps": 200_000, "checkpoint_steps": 200}
        if kind == "slow":  # about ten seconds
            hyperparameters |= {"n_epochs": 1000, "max_steps": 600, "checkpoint_steps": 100}
        block = {
            "teacher": TEACHER,
            "student": {"init": "layers", "num_layers": 2},
            "hyperparameters": hyperparameters,
            "evaluation": {"metrics": ["agreement"], "num_samples": 0},
        }
        return {
            "model": TEACHER,
            "training_file": self._files[FILES.get(kind, "kept")],
            "method": {"type": "distillation", "distillation": block},
            "metadata": {"key": key},
            "seed": 3,
        }


def _rows(num_rows: int) -> bytes:
    lines = [
        {"prompt": f"What is the still number {i}?", "completion": f"The jar of spirit {7 * i}."}
        for i in range(num_rows)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
