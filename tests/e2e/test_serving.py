"""The stock client against two models at once while a third one, too big to come at once, is loading."""

import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.service import TEACHER, Service, start_service
from tests.tiny import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.e2e
PROMPT = "Who keeps the house when the master is away?"
SECOND, BIG = "tiny-gpt2", "big-llama"
BIG_LAYERS, BIG_WIDTH = 20, 768


@pytest.fixture(scope="module")
def big_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 170 million random parameters: reading and packing them takes a while, honestly."""
    import torch
    import transformers as hf

    tokenizer = tiny_tokenizer()
    config = tiny_config("llama", tokenizer, BIG_LAYERS)
    config.update(
        {"hidden_size": BIG_WIDTH, "intermediate_size": 4 * BIG_WIDTH, "head_dim": BIG_WIDTH // 4}
    )
    folder = tmp_path_factory.mktemp("big") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def service(
    service_dir: Path, tiny_llama_dir: Path, tiny_gpt2_dir: Path, big_dir: Path
) -> Iterator[Service]:
    """A service of its own, because models come and go in it."""
    running = start_service(service_dir / "e2e-serving", STILLHOUSE_SERVE_HEARTBEAT_SECONDS="0.1")
    try:
        for name, folder in ((TEACHER, tiny_llama_dir), (SECOND, tiny_gpt2_dir), (BIG, big_dir)):
            running.cli("models", "import", str(folder), "--name", name)
        yield running
    finally:
        assert running.stop() == 0


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {service.key}"}
    with httpx.Client(base_url=f"{service.url}/v1", headers=headers, timeout=60) as made:
        yield made


def ask(client: openai.OpenAI, model: str) -> dict[str, str]:
    """Greedy text by all ways that the client has for it."""
    asked: dict[str, Any] = {"model": model, "max_tokens": 12, "temperature": 0}
    chunks = client.completions.create(**asked, prompt=PROMPT, stream=True)
    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(**asked, messages=messages)
    deltas = client.chat.completions.create(**asked, messages=messages, stream=True)
    return {
        "whole": client.completions.create(**asked, prompt=PROMPT).choices[0].text,
        "streamed": "".join(chunk.choices[0].text for chunk in chunks),
        "chat": chat.choices[0].message.content or "",
        "streamed chat": "".join(chunk.choices[0].delta.content or "" for chunk in deltas),
    }


def run_batch(client: openai.OpenAI, model: str) -> str:
    """The text of a batch of one line."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    file = client.files.create(
        file=("in.jsonl", io.BytesIO(json.dumps(line).encode())), purpose="batch"
    )
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 240
    while batch.status != "completed":
        assert batch.status in ("validating", "in_progress", "finalizing"), batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id is not None
    answer = json.loads(client.files.content(batch.output_file_id).text)
    text: str = answer["response"]["body"]["choices"][0]["text"]
    return text


def demand_refusals(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gone", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=TEACHER, prompt=PROMPT * 200, max_tokens=4)
    assert long.value.code == "context_length_exceeded"


def test_two_models_answer_in_every_way_while_a_third_is_loading(
    service: Service, http: httpx.Client
) -> None:
    with service.client() as client, ThreadPoolExecutor(4) as threads:
        alone = {model: ask(client, model) for model in (TEACHER, SECOND)}
        assert http.get(f"/models/{BIG}/status").json()["state"] == "absent"
        seen: list[dict[str, Any]] = []
        has_loaded = threading.Event()

        def watch() -> None:
            while not has_loaded.is_set():
                status = http.get(f"/models/{BIG}/status").json()
                seen.append(status["workers"][0])
                if status["state"] in ("resident", "failed"):
                    has_loaded.set()
                time.sleep(0.02)

        assert http.post(f"/models/{BIG}/load").json()["state"] == "loading"
        watching = threads.submit(watch)
        batch = threads.submit(run_batch, client, SECOND)
        num_beside = 0
        while not has_loaded.is_set():
            crowd = {model: threads.submit(ask, client, model) for model in alone}
            demand_refusals(client)
            for model, answers in crowd.items():
                assert answers.result(60) == alone[model]
            if num_beside == 0:
                assert batch.result(60) == alone[SECOND]["whole"]
            num_beside += not has_loaded.is_set()
        assert num_beside, "the big model came too soon to tell"
        watching.result(60)
        assert seen[-1]["state"] == "resident", seen[-1]
        percents = [state["percent"] for state in seen if state["state"] == "loading"]
        assert percents == sorted(percents)
        assert seen[-1]["first_token_ms"] > 0
        assert alone[TEACHER]["whole"] == alone[TEACHER]["streamed"]
        assert alone[TEACHER]["chat"] == alone[TEACHER]["streamed chat"]
        assert client.completions.create(model=BIG, prompt=PROMPT, max_tokens=2).usage is not None
