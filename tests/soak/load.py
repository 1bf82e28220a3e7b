"""Mixed load on a whole service: jobs, prompts, uploads, batches and reads, each in a thread of its own.

Everything that a client can delete is deleted again, so that what is left belongs to the service.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx

from tests.e2e.service import TEACHER, Service

Json = dict[str, Any]  # Any: JSON bodies of the public API
JOB_SECONDS: Final = 300.0
BATCH_SECONDS: Final = 120.0
ENDED_JOBS: Final = frozenset({"succeeded", "failed", "cancelled"})
ENDED_BATCHES: Final = frozenset({"completed", "failed", "expired", "cancelled"})
BUSY: Final = frozenset({409, 429, 503})
MAX_FAULTS: Final = 20


class SoakFault(Exception):
    """The service did something that it must not do."""


class Load:
    """All threads of the load. `counts` tells what was done, `faults` what went wrong."""

    def __init__(self, service: Service, teacher_dir: Path, seed: int) -> None:
        self._service, self._teacher_dir, self._seed = service, teacher_dir, seed
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        kinds: dict[str, Callable[[Caller], None]] = {
            "jobs": run_job,
            "prompts 1": send_prompt,
            "prompts 2": send_prompt,
            "uploads": upload_and_delete,
            "batches": run_batch,
            "reads": read_pages,
        }
        self._threads = [
            threading.Thread(target=self._repeat, args=(name, action), name=name)
            for name, action in kinds.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Lets each thread end what it has begun."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, name: str, action: Callable[["Caller"], None]) -> None:
        with Caller(
            self, self._service, self._teacher_dir, random.Random(f"{self._seed} {name}")
        ) as caller:
            while not self._is_over.is_set():
                try:
                    action(caller)
                except (SoakFault, httpx.HTTPError, KeyError, ValueError, AssertionError) as error:
                    with self._lock:
                        self.faults.append(f"{name}: {type(error).__name__}: {error}"[:500])
                    self._is_over.wait(1.0)
                self._is_over.wait(caller.rng.uniform(0.0, 0.3))

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


class Caller:
    """One thread's HTTP client and random numbers."""

    def __init__(self, load: Load, service: Service, teacher_dir: Path, rng: random.Random) -> None:
        self.load, self.service, self.teacher_dir, self.rng = load, service, teacher_dir, rng
        headers = {"Authorization": f"Bearer {service.key}"}
        self.http = httpx.Client(
            base_url=f"{service.url}/v1", headers=headers, timeout=120, trust_env=False
        )

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def call(self, method: str, path: str, **options: Any) -> Json:  # Any: httpx's own
        """One request that must succeed; repeated while the service says that it is busy."""
        deadline = time.monotonic() + 60
        while True:
            answer = self.http.request(method, path, **options)
            if answer.status_code == 200:
                body: Json = answer.json()
                return body
            if answer.status_code not in BUSY or time.monotonic() > deadline:
                raise SoakFault(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
            self.load.count("busy")
            time.sleep(0.5)

    def upload(self, lines: list[Json], purpose: str) -> str:
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file_id: str = self.call(
            "POST", "/files", files={"file": ("rows.jsonl", content)}, data={"purpose": purpose}
        )["id"]
        return file_id

    def delete(self, *paths: str) -> None:
        for path in paths:
            self.call("DELETE", path)

    def wait_for(self, path: str, ended: frozenset[str], seconds: float) -> Json:
        deadline = time.monotonic() + seconds
        while (body := self.call("GET", path))["status"] not in ended:
            if time.monotonic() > deadline:
                raise SoakFault(f"{path} has not ended after {seconds:.0f} s: {body['status']}")
            time.sleep(0.5)
        return body


def run_job(caller: Caller) -> None:
    """A training job that ends, is cancelled or is paused and resumed; or an import."""
    kind = caller.rng.choice(("trained", "trained", "cancelled", "paused", "imported"))
    if kind == "imported":
        import_and_delete(caller)
    else:
        train_and_delete(caller, kind)
    caller.load.count(f"job {kind}")


def train_and_delete(caller: Caller, kind: str) -> None:
    first = caller.rng.randrange(10**6)
    rows = [
        {"prompt": f"What is {i}?", "completion": f"It is {7 * i}."}
        for i in range(first, first + 16)
    ]
    file_id = caller.upload(rows, "fine-tune")
    job_id = caller.call(
        "POST", "/fine_tuning/jobs", json=job_body(file_id, is_long=kind != "trained")
    )["id"]
    path = f"/fine_tuning/jobs/{job_id}"
    if kind != "trained":
        wait_until_it_trains(caller, path)
        caller.call("POST", f"{path}/{'cancel' if kind == 'cancelled' else 'pause'}")
    if kind == "paused":
        caller.wait_for(path, ENDED_JOBS | {"paused"}, JOB_SECONDS)
        caller.call("POST", f"{path}/resume")
        wait_until_it_trains(caller, path)
        caller.call("POST", f"{path}/cancel")
    job = caller.wait_for(path, ENDED_JOBS, JOB_SECONDS)
    if job["status"] != ("succeeded" if kind == "trained" else "cancelled"):
        raise SoakFault(f"{job_id} ({kind}) has {job['status']}: {job['error']}")
    if kind == "trained":
        prompt(caller, job["fine_tuned_model"])
        caller.delete(f"/models/{job['fine_tuned_model']}")
    caller.delete(*(f"/files/{each}" for each in (file_id, *job["result_files"])))


def job_body(file_id: str, *, is_long: bool) -> Json:
    hyperparameters: Json = {
        "n_epochs": 2,
        "max_steps": 6,
        "batch_tokens": 64,
        "checkpoint_steps": 2,
    }
    if is_long:
        hyperparameters |= {"n_epochs": 1000, "max_steps": 100_000, "checkpoint_steps": 200}
    hyperparameters |= {"max_sequence_tokens": 64, "eval_steps": 100_000}
    block = {
        "teacher": TEACHER,
        "student": {"init": "layers", "num_layers": 2},
        "hyperparameters": hyperparameters,
        "evaluation": {"metrics": ["agreement"], "num_samples": 0},
    }
    return {
        "model": TEACHER,
        "training_file": file_id,
        "method": {"type": "distillation", "distillation": block},
    }


def wait_until_it_trains(caller: Caller, path: str) -> None:
    deadline = time.monotonic() + JOB_SECONDS
    while not ((body := caller.call("GET", path))["progress"] or {}).get("step"):
        if body["status"] in ENDED_JOBS or time.monotonic() > deadline:
            raise SoakFault(f"{path} does not train: {body['status']} {body['error']}")
        time.sleep(0.3)


def import_and_delete(caller: Caller) -> None:
    name = f"copy-{caller.rng.randrange(10**9)}"
    caller.service.cli(
        "models", "import", str(caller.teacher_dir), "--name", name, "--project", "default"
    )
    prompt(caller, name)
    caller.delete(f"/models/{name}")


def send_prompt(caller: Caller) -> None:
    """One prompt: answered whole or streamed, cancelled after a few tokens, or refused."""
    kind = caller.rng.choice(("whole", "chat", "streamed", "cancelled", "cancelled", "refused"))
    if kind == "refused":
        refusal = caller.http.post("/completions", json={"model": "none", "prompt": "a"})
        if refusal.status_code != 404:
            raise SoakFault(f"a prompt for no model was answered with {refusal.status_code}")
    elif kind == "whole":
        prompt(caller, TEACHER, n=caller.rng.choice((1, 3)), temperature=1.0)
    elif kind == "chat":
        messages = [{"role": "user", "content": "Who keeps the house?"}]
        chat = {"model": TEACHER, "messages": messages, "max_tokens": 16}
        caller.call("POST", "/chat/completions", json=chat)
    else:
        stream(caller, num_lines=caller.rng.randrange(1, 12) if kind == "cancelled" else None)
    caller.load.count(f"prompt {kind}")


def prompt(caller: Caller, model: str, **options: object) -> None:
    body = {
        "model": model,
        "prompt": "What is it?",
        "max_tokens": caller.rng.randrange(1, 48),
        **options,
    }
    caller.call("POST", "/completions", json=body)


def stream(caller: Caller, num_lines: int | None) -> None:
    """Reads a stream to its end, or goes away after so many lines."""
    body = {
        "model": TEACHER,
        "prompt": "What is it?",
        "max_tokens": 64,
        "stream": True,
        "ignore_eos": True,
    }
    with caller.http.stream("POST", "/completions", json=body) as answer:
        if answer.status_code != 200:
            if answer.status_code in BUSY:
                caller.load.count("busy")
                return
            raise SoakFault(
                f"a stream was refused: {answer.status_code} {answer.read().decode()[:300]}"
            )
        last = ""
        for number, line in enumerate(line for line in answer.iter_lines() if line):
            if num_lines is not None and number >= num_lines:
                return
            last = line
        if last != "data: [DONE]":
            raise SoakFault(f"a stream ended with {last[:200]!r}")


def upload_and_delete(caller: Caller) -> None:
    """An upload that is read back, listed and deleted."""
    words = "".join(caller.rng.choices("abcdefgh ", k=caller.rng.randrange(1, 2000)))
    rows = [{"prompt": f"{number} {words}", "completion": "b"} for number in range(50)]
    file_id = caller.upload(rows, "fine-tune")
    content = caller.http.get(f"/files/{file_id}/content")
    if [json.loads(line) for line in content.text.splitlines()] != rows:
        raise SoakFault(f"{file_id} does not come back as it was uploaded")
    caller.call("GET", "/files")
    caller.delete(f"/files/{file_id}")
    caller.load.count("upload")
    time.sleep(0.5)


def run_batch(caller: Caller) -> None:
    """A batch that is completed or cancelled."""
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": TEACHER, "prompt": f"What is {number}?", "max_tokens": 8},
        }
        for number in range(8)
    ]
    file_id = caller.upload(lines, "batch")
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch_id = caller.call("POST", "/batches", json=body)["id"]
    is_cancelled = caller.rng.random() < 0.25
    if is_cancelled:
        caller.http.post(f"/batches/{batch_id}/cancel")  # 409 if it has ended already
    batch = caller.wait_for(f"/batches/{batch_id}", ENDED_BATCHES, BATCH_SECONDS)
    if batch["status"] not in ({"completed", "cancelled"} if is_cancelled else {"completed"}):
        raise SoakFault(f"{batch_id} has {batch['status']}: {batch['errors']}")
    made = [batch[name] for name in ("output_file_id", "error_file_id") if batch[name]]
    caller.delete(*(f"/files/{each}" for each in (file_id, *made)))
    caller.load.count("batch cancelled" if is_cancelled else "batch")
    time.sleep(1.0)


def read_pages(caller: Caller) -> None:
    """Lists, metrics and the events of a job."""
    jobs = caller.call("GET", "/fine_tuning/jobs", params={"limit": 5})["data"]
    caller.call("GET", "/models")
    for job in jobs[:1]:
        caller.call("GET", f"/fine_tuning/jobs/{job['id']}/events")
        caller.call("GET", f"/fine_tuning/jobs/{job['id']}/checkpoints")
    caller.http.get(f"{caller.service.url}/metrics")
    caller.load.count("read")
    time.sleep(0.5)
