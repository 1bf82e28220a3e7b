"""kill -9 of the trainer and of the train worker, and a stopped Valkey: nothing is lost and nothing is done twice."""

import hashlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from app.local.embedded_servers import LocalValkey
from tests.e2e.service import TEACHER, Service, start_service
from tests.e2e.test_openai_client import extra, method, rows, wait

pytestmark = pytest.mark.e2e
SHORT = {
    "n_epochs": 2,
    "batch_tokens": 128,
    "max_sequence_tokens": 96,
    "eval_steps": 100000,
    "checkpoint_steps": 50,
}
LONG = {**SHORT, "n_epochs": 24}  # seconds of work are left when the first checkpoint is written


@pytest.fixture(scope="module")
def faulty(service_dir: Path, tiny_llama_dir: Path) -> Iterator[tuple[Service, LocalValkey]]:
    """A service whose Valkey the test itself starts and stops."""
    folder = service_dir / "faults"
    valkey = LocalValkey(folder / "valkey")
    valkey.start()
    service = start_service(folder / "data", STILLHOUSE_REDIS_URL=valkey.url)
    try:
        service.cli("models", "import", str(tiny_llama_dir), "--name", TEACHER)
        yield service, valkey
    finally:
        service.stop()
        valkey.stop()


def submit(client: openai.OpenAI, suffix: str, numbers: dict[str, int] = LONG) -> str:
    file = client.files.create(file=("train.jsonl", rows(40)), purpose="fine-tune")
    body: Any = method(hyperparameters=numbers)
    job = client.fine_tuning.jobs.create(
        model=TEACHER, training_file=file.id, suffix=suffix, seed=3, method=body
    )
    return job.id


def weights_sha256(service: Service, job_id: str) -> str:
    """Digest of the registered student's weights in the store."""
    (path,) = (service.data_dir / "store" / "models").glob(f"{job_id}/**/model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def models_with(client: openai.OpenAI, suffix: str) -> list[str]:
    return [model.id for model in client.models.list() if f":{suffix}:" in model.id]


def wait_for_checkpoint(client: openai.OpenAI, job_id: str) -> None:
    give_up = time.monotonic() + 120
    while not client.fine_tuning.jobs.checkpoints.list(job_id).data:
        assert time.monotonic() < give_up, "no checkpoint came"
        time.sleep(0.1)


def trainer(service: Service) -> psutil.Process:
    (found,) = service.processes("worker.train")
    return found


@pytest.fixture(scope="module")
def uninterrupted_sha256(faulty: tuple[Service, LocalValkey]) -> str:
    service, _ = faulty
    with service.client() as client:
        job_id = submit(client, "calm")
        job = wait(client, job_id)
        assert job.status == "succeeded", job.error
    return weights_sha256(service, job_id)


@pytest.mark.parametrize("victim", ["trainer", "worker"])
def test_a_killed_process_costs_a_resume_and_nothing_else(
    faulty: tuple[Service, LocalValkey], uninterrupted_sha256: str, victim: str
) -> None:
    service, _ = faulty
    with service.client() as client:
        job_id = submit(client, f"killed-{victim}")
        wait_for_checkpoint(client, job_id)
        process = trainer(service)
        if victim == "worker":
            (process,) = service.processes("worker.main", "train")
        process.send_signal(signal.SIGKILL)
        job = wait(client, job_id)
        assert job.status == "succeeded", job.error
        assert extra(job, "attempt") == 2
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job_id)]
        assert any("resum" in message.lower() for message in messages), messages
        assert models_with(client, f"killed-{victim}") == [job.fine_tuned_model]
    assert weights_sha256(service, job_id) == uninterrupted_sha256


def test_a_job_is_accepted_while_valkey_is_down_and_runs_when_it_is_back(
    faulty: tuple[Service, LocalValkey],
) -> None:
    service, valkey = faulty
    with service.client() as client:
        valkey.stop()
        job_id = submit(client, "no-broker", SHORT)
        assert client.fine_tuning.jobs.retrieve(job_id).status == "queued"
        time.sleep(2)
        valkey.start()
        job = wait(client, job_id, seconds=180)
        assert job.status == "succeeded", job.error
        assert models_with(client, "no-broker") == [job.fine_tuned_model]
