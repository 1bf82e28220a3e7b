"""Integrations of a job as the `openai` client submits them."""

import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import text

from app.db.session import engine
from app.settings import Settings, get_settings
from tests.app.api.conftest import refusal
from tests.serve_worker import ROOT
from tests.waiting import wait_for

Json = dict[str, Any]  # Any: JSON bodies of the public API
PAGE = ROOT / "docs/trackers.md"
ROWS = [{"prompt": f"What is {n}?", "completion": "A number."} for n in range(20)]
WANDB = {"type": "wandb", "wandb": {"project": "p"}}
MLFLOW = {"type": "mlflow", "mlflow": {"experiment": "e"}}


@pytest.fixture
def body(client: openai.OpenAI, upload: Callable[..., str], register: Callable[..., str]) -> Json:
    return {"model": register("my-student"), "training_file": upload(client, ROWS)}


def test_the_job_of_the_page_shows_its_integrations_with_their_defaults(
    client: openai.OpenAI, body: Json, settings_env: Callable[..., Settings]
) -> None:
    settings_env(wandb_api_key="key", mlflow_tracking_uri="http://127.0.0.1:9")
    names = {"client": client, "file": client.files.retrieve(body["training_file"])}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0], names)
    job: Any = names["job"]
    assert job.integrations[0].wandb.project == "titles"
    wandb = {"project": "titles", "name": None, "entity": None, "tags": ["nightly"]}
    mlflow = {"experiment": "titles", "run_name": None, "tags": {"team": "search"}}
    assert [integration.to_dict() for integration in job.integrations] == [
        {"type": "wandb", "wandb": wandb},
        {"type": "mlflow", "mlflow": mlflow},
        {"type": "tensorboard", "tensorboard": {}},
    ]
    assert client.fine_tuning.jobs.retrieve(job.id).integrations == job.integrations


def test_the_api_process_closes_the_run_of_a_cancelled_job(
    client: openai.OpenAI, body: Json
) -> None:
    wanted: Any = [{"type": "tensorboard"}]
    job = client.fine_tuning.jobs.create(**body, integrations=wanted)
    client.fine_tuning.jobs.cancel(job.id)
    with engine().begin() as connection:  # the run may have been examined while the job was queued
        connection.execute(text("UPDATE tracker_runs SET due_at = now()"))
    folder = get_settings().tensorboard_root() / job.id
    wait_for(
        lambda: b"cancelled" in b"".join(p.read_bytes() for p in folder.glob("*")), 30, "no end"
    )


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
