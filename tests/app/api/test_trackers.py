"""Integrations of a job as the `openai` client submits them."""

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from app.settings import Settings
from tests.app.api.conftest import refusal

Json = dict[str, Any]  # Any: JSON bodies of the public API
ROWS = [{"prompt": f"What is {n}?", "completion": "A number."} for n in range(20)]
WANDB = {"type": "wandb", "wandb": {"project": "p"}}
MLFLOW = {"type": "mlflow", "mlflow": {"experiment": "e"}}


@pytest.fixture
def body(client: openai.OpenAI, upload: Callable[..., str], register: Callable[..., str]) -> Json:
    return {"model": register(), "training_file": upload(client, ROWS)}


def test_integrations_are_shown_with_their_defaults(
    client: openai.OpenAI, body: Json, settings_env: Callable[..., Settings]
) -> None:
    settings_env(wandb_api_key="key", mlflow_tracking_uri="http://127.0.0.1:9")
    wanted: Any = [WANDB, MLFLOW, {"type": "tensorboard"}]
    job = client.fine_tuning.jobs.create(**body, integrations=wanted)
    assert job.integrations is not None
    assert job.integrations[0].wandb.project == "p"
    assert [integration.to_dict() for integration in job.integrations] == [
        {"type": "wandb", "wandb": {"project": "p", "name": None, "entity": None, "tags": []}},
        {"type": "mlflow", "mlflow": {"experiment": "e", "run_name": None, "tags": {}}},
        {"type": "tensorboard", "tensorboard": {}},
    ]
    assert client.fine_tuning.jobs.retrieve(job.id).integrations == job.integrations


def test_trackers_that_cannot_be_used_are_refused(http: httpx.Client, body: Json) -> None:
    for integration, setting in ((WANDB, "WANDB_API_KEY"), (MLFLOW, "MLFLOW_TRACKING_URI")):
        answer = http.post("/v1/fine_tuning/jobs", json=body | {"integrations": [integration]})
        assert refusal(answer) == (400, "integration_not_configured", "integrations")
        assert f"STILLHOUSE_{setting}" in answer.json()["error"]["message"]
    twice = http.post(
        "/v1/fine_tuning/jobs", json=body | {"integrations": [{"type": "tensorboard"}] * 2}
    )
    assert refusal(twice) == (400, "invalid_value", "integrations")
    bad: list[Json] = [
        {"type": "comet"},
        {"type": "wandb"},
        {"type": "wandb", "wandb": {"project": "a/b"}},
        {"type": "mlflow", "mlflow": {"experiment": "e", "tags": {"a\n": "b"}}},
        {"type": "tensorboard", "tensorboard": {"dir": "/"}},
    ]
    for integration in bad:
        answer = http.post("/v1/fine_tuning/jobs", json=body | {"integrations": [integration]})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith("integrations")
