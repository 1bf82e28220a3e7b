"""Estimates against real jobs of the service: adapters without a teacher, and a ladder."""

import json
import time
from typing import Any

import openai
import pytest

from tests.e2e.service import TEACHER, Json, Service, assert_estimated, estimate

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ROWS = [
    {"prompt": f"Who keeps number {i}?", "completion": f"The student keeps {'the jar ' * (i % 5)}{i}."}
    for i in range(40)
]  # fmt: skip
LADDER: Json = {
    "teacher": TEACHER,
    "student": {"num_layers": [1, 2], "fit_rows": 8},
    "data": {"max_new_tokens": 16},
    "hyperparameters": {"n_epochs": 2, "batch_tokens": 256},
    "evaluation": {"metrics": ["perplexity"], "num_samples": 0},
}
METHODS: dict[str, Any] = {  # Any: the SDK's types know no distillation
    "adapters": {"type": "supervised", "supervised": {"lora": {"rank": 4}}},
    "ladder": {"type": "distillation", "distillation": LADDER},
}


@pytest.fixture(scope="module")
def training_file(service: Service) -> str:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with service.client() as client:
        return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id


@pytest.mark.parametrize("name", METHODS)
def test_a_job_needs_what_was_estimated(
    client: openai.OpenAI, training_file: str, name: str
) -> None:
    body: Json = {"model": TEACHER, "training_file": training_file, "method": METHODS[name]}
    body["hyperparameters"] = {"n_epochs": 2}
    estimated = estimate(client, **body)
    assert estimated["workers"]["alive"] == 1
    assert estimated["fits"] is True
    job = client.fine_tuning.jobs.create(**body)
    deadline = time.monotonic() + 300
    while job.status in {"queued", "running"} and time.monotonic() < deadline:
        time.sleep(0.3)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert_estimated(estimated, job)
    again = estimate(client, **body)
    assert again["seconds"]["total"] > 0
    assert any("finished job" in note for note in again["notes"])
