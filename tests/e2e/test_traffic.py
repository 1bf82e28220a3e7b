"""The stock client stores chats, makes a data set of them, and distils a student from it."""

import time
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.service import TEACHER, Service
from tests.e2e.test_openai_client import method, wait

pytestmark = pytest.mark.e2e
Json = dict[str, Any]  # Any: JSON
NUM_CHATS = 30


def dataset_of(http: httpx.Client, body: Json) -> Json:
    answer = http.post("/datasets", json=body)
    assert answer.status_code == 200, answer.text
    dataset: Json = answer.json()
    deadline = time.monotonic() + 240
    while dataset["status"] in ("queued", "running") and time.monotonic() < deadline:
        time.sleep(0.2)
        dataset = http.get(f"/datasets/{dataset['id']}").json()
    assert dataset["status"] == "succeeded", dataset
    return dataset


def test_stored_chats_become_a_data_set_and_a_student(
    service: Service, client: openai.OpenAI
) -> None:
    completions = client.chat.completions
    since = int(time.time())
    ids = []
    for number in range(NUM_CHATS):
        messages: Any = [{"role": "user", "content": f"Who keeps lantern {number * 7919 % 9973}?"}]
        request: dict[str, Any] = {
            "model": TEACHER, "messages": messages, "max_tokens": 12, "temperature": 1.0,
            "seed": number, "store": True, "metadata": {"task": "keep" if number % 2 else "watch"},
        }  # fmt: skip
        if number % 3:
            ids.append(completions.create(**request).id)
        else:
            chunks = list(completions.create(**request, stream=True))
            ids.append(chunks[0].id)
    deadline = time.monotonic() + 120
    times = {"created_after": since}
    while len(list(completions.list(extra_query=times))) < NUM_CHATS:
        assert time.monotonic() < deadline, "the chats are not stored"
        time.sleep(0.1)

    assert [row.id for row in completions.list(limit=7, extra_query=times)] == ids
    watched = [row.id for row in completions.list(metadata={"task": "watch"}, extra_query=times)]
    assert watched == ids[::2]
    assert completions.messages.list(ids[3]).data[0].content.startswith("Who keeps lantern")  # type: ignore[union-attr]
    changed: Any = completions.update(ids[0], metadata={"task": "other"})
    assert changed.metadata == {"task": "other"}
    assert completions.delete(ids[1]).deleted
    with pytest.raises(openai.NotFoundError):
        completions.retrieve(ids[1])

    headers = {"authorization": f"Bearer {service.key}"}
    with httpx.Client(base_url=f"{service.url}/v1", headers=headers, timeout=30) as http:
        dataset = dataset_of(
            http,
            {
                "name": "lanterns",
                "filter": {"model": TEACHER, "created_after": since},
                "finish_reasons": ["stop", "length"],
                "mask": "all",
                "validation_fraction": 0.2,
                "test_fraction": 0.0,
            },
        )
        report = dataset["report"]
        assert report["num_completions"] == NUM_CHATS - 1
        left_out = sum(report["left_out"].values())
        assert report["num_rows"] + left_out == NUM_CHATS - 1
        assert report["num_rows"] >= NUM_CHATS // 2

        job = client.fine_tuning.jobs.create(
            model=TEACHER,
            training_file=dataset["training_file"],
            validation_file=dataset["validation_file"],
            method=method(),
        )
        refused = http.delete(f"/datasets/{dataset['id']}")
        assert refused.status_code == 409, refused.text
        job = wait(client, job.id)
        assert job.status == "succeeded", job.error
        assert http.delete(f"/datasets/{dataset['id']}").json()["deleted"] is True
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(dataset["training_file"])
