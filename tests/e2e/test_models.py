"""A model goes in over HTTP, is distilled, and its student goes out again, with the stock client."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.service import Service
from tests.e2e.test_openai_client import method, rows, wait
from tests.hub_server import running_hub

pytestmark = pytest.mark.e2e
NAME = "uploaded"
ALIAS = "/models/exchange/aliases/live"
PROMPT = "Who keeps the house when the master is away?"


@pytest.fixture(scope="module")
def student(service: Service, tiny_llama_dir: Path) -> Iterator[str]:
    """A student of a teacher that was uploaded over HTTP by a tenant's key."""
    printed = service.cli(
        "models", "import", str(tiny_llama_dir), "--name", NAME,
        "--url", service.url, "--api-key", service.key,
    )  # fmt: skip
    assert f"Imported {NAME}" in printed
    with service.client() as client:
        file = client.files.create(file=("train.jsonl", rows(40)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=NAME, training_file=file.id, method=method(teacher=NAME), suffix="exchange"
        )
        with pytest.raises(openai.ConflictError) as refused:
            client.models.delete(NAME)
        assert job.id in refused.value.message
        job = wait(client, job.id)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model is not None
        client.put(ALIAS, cast_to=object, body={"model": NAME})
        client.put(ALIAS, cast_to=object, body={"model": job.fine_tuned_model})
        yield job.fine_tuned_model


def greedy_text(folder: Path) -> str:
    """The text that transformers generates with the files in a folder."""
    import torch
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    text: str = tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


def test_a_pulled_student_writes_what_the_service_writes(
    service: Service, client: openai.OpenAI, student: str, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    service.cli(
        "models", "pull", "exchange@live", str(folder), "--url", service.url,
        "--api-key", service.key,
    )  # fmt: skip
    served = client.completions.create(
        model="exchange@live", prompt=PROMPT, max_tokens=12, temperature=0
    )
    assert served.choices[0].text != ""
    assert greedy_text(folder) == served.choices[0].text
    card = (folder / "README.md").read_text()
    assert card == client.get(f"/models/{student}/card", cast_to=str)
    for part in (f"- Teacher: `{NAME}`", "| training | 40 |", "| kl |", "torch", "## Recipe"):
        assert part in card, part


def test_an_alias_is_rolled_back_and_its_models_are_protected(
    client: openai.OpenAI, student: str
) -> None:
    with pytest.raises(openai.ConflictError) as refused:
        client.models.delete(student)
    assert "exchange@live" in refused.value.message
    answer: Any = client.post(f"{ALIAS}/rollback", cast_to=object, body={"from": student})
    assert answer["model"] == NAME
    with pytest.raises(openai.ConflictError):
        client.post(f"{ALIAS}/rollback", cast_to=object, body={"from": student})
    with pytest.raises(openai.ConflictError):
        client.models.delete(NAME)
    again: Any = client.post(f"{ALIAS}/rollback", cast_to=object)
    assert again["model"] == student
    history: Any = client.get(f"{ALIAS}/history", cast_to=object)
    assert [(change["from"], change["to"]) for change in history["data"]] == [
        (NAME, student),
        (student, NAME),
        (NAME, student),
        (None, NAME),
    ]


def test_a_student_is_pushed_to_a_hub(service: Service, student: str) -> None:
    with running_hub() as hub:
        token = {"STILLHOUSE_HF_TOKEN": hub.token}
        pusher = dataclasses.replace(service, environment=service.environment | token)
        printed = pusher.cli(
            "models", "push", student, "org/student", "--hub", hub.url,
            "--url", service.url, "--api-key", service.key,
        )  # fmt: skip
        assert f"{hub.url}/org/student/commit/" in printed
        assert {"README.md", "config.json", "model.safetensors"} <= set(
            hub.repositories["org/student"]
        )
