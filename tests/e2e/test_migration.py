"""OpenAI's example code for fine-tuning, with another `base_url` and model name."""

import csv
import io
import json
import time
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from tests.e2e.service import TEACHER, Service
from tests.waiting import wait_for

pytestmark = pytest.mark.e2e
NAMES = ["lantern", "still", "house", "jar", "student", "master"]


def chat_rows(num_rows: int) -> bytes:
    """Rows in the format of OpenAI's guide."""
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Marv is a factual chatbot that is also sarcastic."},
                {"role": "user", "content": f"What is the {NAMES[i % 6]} number {i}?"},
                {"role": "assistant", "content": "Ask a short question.", "weight": 1},
            ]
        }
        for i in range(num_rows)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def poll(client: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    deadline = time.monotonic() + 300
    while job.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.3)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    return job


@pytest.fixture(scope="module")
def finished(service: Service) -> FineTuningJob:
    """The job of the example, after polling has ended."""
    client = service.client()
    training = client.files.create(file=("mydata.jsonl", chat_rows(20)), purpose="fine-tune")
    tensorboard: Any = {"type": "tensorboard"}  # Any: an extension of OpenAI's integrations
    job = client.fine_tuning.jobs.create(
        training_file=training.id, model=TEACHER, integrations=[tensorboard]
    )
    return poll(client, job)


def test_the_job_compares_the_model_before_and_after(
    client: openai.OpenAI, finished: FineTuningJob
) -> None:
    assert finished.fine_tuned_model is not None
    assert finished.hyperparameters.n_epochs == 5  # of 20 rows
    assert (finished.trained_tokens or 0) > 0
    result = (finished.model_extra or {})["result"]
    assert result["after"]["loss"] < result["before"]["loss"]
    assert "teacher" not in result
    model = client.models.retrieve(finished.fine_tuned_model)
    assert (model.model_extra or {})["origin"] == "fine-tuned"


def test_tensorboard_has_the_metrics_of_the_job(service: Service, finished: FineTuningJob) -> None:
    folder = service.data_dir / "tensorboard" / finished.id
    wait_for(
        lambda: any(b"result/" in path.read_bytes() for path in folder.glob("*")), 30, "no result"
    )
    (path,) = folder.iterdir()
    written = [
        (value.tag, event.step)
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.HasField("simple_value") and not value.tag.startswith("result/")
    ]
    answer = service.client().get(
        f"/fine_tuning/jobs/{finished.id}/metrics", cast_to=httpx.Response
    )
    series = answer.json()["data"]
    points = [(each["name"], point["step"]) for each in series for point in each["points"]]
    assert sorted(written) == sorted(points)
    assert ("train_loss", 1) in points


def test_a_chat_with_the_fine_tuned_model_gives_the_answer_of_the_rows(
    client: openai.OpenAI, finished: FineTuningJob
) -> None:
    # a random model needs a high rate to learn from 20 rows
    job = client.fine_tuning.jobs.create(
        training_file=finished.training_file,
        model=TEACHER,
        suffix="Marv 2",
        hyperparameters={"n_epochs": 20, "batch_size": 4, "learning_rate_multiplier": 50},
    )
    name = poll(client, job).fine_tuned_model
    assert name is not None
    assert ":marv-2:" in name
    completion = client.chat.completions.create(
        model=name,
        messages=[
            {"role": "system", "content": "Marv is a factual chatbot that is also sarcastic."},
            {"role": "user", "content": "What is the jar number 3?"},
        ],
        temperature=0,
    )
    assert completion.choices[0].message.content == "Ask a short question."
    assert completion.choices[0].finish_reason == "stop"


def test_events_and_checkpoints_have_openais_names(
    client: openai.OpenAI, finished: FineTuningJob
) -> None:
    events = list(client.fine_tuning.jobs.list_events(finished.id, limit=10))[::-1]
    messages = [event.message for event in events]
    assert messages[:4] == [
        f"Created fine-tuning job: {finished.id}",
        f"Validating training file: {finished.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    assert messages[-2:] == [
        f"New fine-tuned model created: {finished.fine_tuned_model}",
        "The job has successfully completed",
    ]
    steps = [event for event in events if event.type == "metrics"]
    data: list[Any] = [event.to_dict()["data"] for event in steps]  # Any: open JSON
    assert any(step.message.startswith("Step 1/") for step in steps)
    assert {"step", "total_steps", "train_loss", "train_mean_token_accuracy"} <= data[1].keys()
    (newest, *_) = client.fine_tuning.jobs.checkpoints.list(finished.id)
    metrics = newest.metrics.to_dict()
    names = ("train_loss", "valid_loss", "full_valid_loss", "train_mean_token_accuracy")
    assert all(isinstance(metrics[name], float) for name in names)
    assert newest.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{newest.step_number}")


def test_the_result_file_is_openais_table(client: openai.OpenAI, finished: FineTuningJob) -> None:
    text = client.files.content(finished.result_files[0]).text
    header, *rows = csv.reader(io.StringIO(text))
    columns = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert header == columns
    assert float(rows[-1][1]) < float(next(row[1] for row in rows if row[1]))
