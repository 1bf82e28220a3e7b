"""Stored completions over real HTTP, as the stock client reads and changes them."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from app.settings import Settings
from tests.app.api.conftest import Service
from tests.serve_worker import WorkerProcess
from tests.stored_rows import BEGUN_AT, insert, record
from tests.waiting import wait_for

MESSAGES: Any = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a lantern?"}]},
]  # fmt: skip
REQUEST: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}


def stored(client: openai.OpenAI, completion_id: str) -> Any:  # Any: fields beyond the client's
    def is_stored() -> bool:
        try:
            client.chat.completions.retrieve(completion_id)
        except openai.NotFoundError:
            return False
        return True

    wait_for(is_stored, 10, f"{completion_id} is not stored")
    return client.chat.completions.retrieve(completion_id)


def test_a_stored_answer_equals_the_one_that_the_client_got(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "seed": 3, "user": "u"}
    schema = {"name": "a", "schema": {"type": "object"}}
    options["response_format"] = {"type": "json_schema", "json_schema": schema}
    answer = client.chat.completions.create(
        **REQUEST, **options, store=True, metadata={"team": "x"}
    )
    kept = stored(client, answer.id)
    assert kept.response_format == options["response_format"]
    assert kept.choices == answer.choices
    assert kept.choices[0].logprobs.content[0].top_logprobs
    assert kept.usage == answer.usage
    assert (kept.created, kept.model) == (answer.created, "tiny")
    assert (kept.metadata, kept.input_user, kept.seed) == ({"team": "x"}, "u", 3)
    assert kept.temperature == 0
    assert kept.request_id == answer._request_id
    assert 0 < kept.latency_seconds < 20
    messages = client.chat.completions.messages.list(answer.id)
    assert [message.id for message in messages.data] == [f"{answer.id}-0", f"{answer.id}-1"]
    first, second = messages.data
    assert (first.role, first.content, first.content_parts) == ("system", "Be short.", None)
    assert second.content == "What is a lantern?"
    assert second.content_parts is not None
    assert len(second.content_parts) == 2


def test_a_streamed_answer_is_stored_as_a_whole(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    answer = client.chat.completions.create(**REQUEST, n=2, logprobs=True)
    chunks = list(
        client.chat.completions.create(**REQUEST, n=2, logprobs=True, stream=True, store=True)
    )
    kept = stored(client, chunks[0].id)
    assert kept.choices == answer.choices
    assert kept.usage == answer.usage


def test_nothing_is_stored_without_store_or_when_the_client_leaves(
    worker: WorkerProcess, client: openai.OpenAI, service: Service
) -> None:
    client.chat.completions.create(**REQUEST)
    client.chat.completions.create(**REQUEST, store=False)
    stream = client.chat.completions.create(
        **REQUEST | {"max_tokens": 200}, stream=True, store=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    last = client.chat.completions.create(**REQUEST, store=True)
    stored(client, last.id)
    assert [kept.id for kept in client.chat.completions.list()] == [last.id]


@pytest.fixture
def storing_project(settings_env: Callable[..., Settings]) -> None:
    settings_env(store_projects="other, acme", max_stored_bytes=2000)


def test_a_project_may_store_by_default_and_too_large_answers_are_counted(
    storing_project: None, worker: WorkerProcess, client: openai.OpenAI, http: httpx.Client
) -> None:
    kept = client.chat.completions.create(**REQUEST)
    client.chat.completions.create(**REQUEST, store=False)
    for is_streamed in (False, True):
        large = client.chat.completions.create(
            **REQUEST | {"max_tokens": 32}, stream=is_streamed, logprobs=True, top_logprobs=5
        )
        if is_streamed:
            list(large)
    stored(client, kept.id)
    assert [row.id for row in client.chat.completions.list()] == [kept.id]
    wait_for(lambda: http.get("/health/ready").json()["dropped_completions"] == 2, 5, "not counted")
    line = 'stillhouse_stored_completions_dropped_total{reason="too_large"}'
    assert line in http.get("/metrics").text


def test_lists_are_filtered_paged_and_oldest_first(client: openai.OpenAI) -> None:
    insert(
        [
            record(
                number, model=f"m{number % 2}", metadata={"k": str(number % 3), "n": str(number)}
            )
            for number in range(12)
        ]
    )
    listed = client.chat.completions.list

    def numbers(**filters: Any) -> list[int]:
        return [int(row.id[-4:]) for row in listed(limit=5, **filters)]

    assert numbers() == list(range(12))
    assert numbers(order="desc") == list(range(11, -1, -1))
    assert numbers(model="m1") == [1, 3, 5, 7, 9, 11]
    assert numbers(metadata={"k": "0"}) == [0, 3, 6, 9]
    assert numbers(model="m1", metadata={"k": "0", "n": "9"}) == [9]
    begun = int(BEGUN_AT)
    times = {"created_after": begun + 3, "created_before": begun + 6}
    assert numbers(extra_query=times) == [3, 4, 5]
    assert numbers(after="chatcmpl-0009") == [10, 11]
    page = listed(limit=5)
    assert page.has_more
    assert json.loads(page.to_json())["first_id"] == "chatcmpl-0000"


def test_metadata_is_replaced_and_a_deleted_completion_is_gone(client: openai.OpenAI) -> None:
    insert([record(number, metadata={"a": "1"}) for number in range(2)])
    changed: Any = client.chat.completions.update("chatcmpl-0000", metadata={"b": "2"})
    assert changed.metadata == {"b": "2"}
    assert [row.id for row in client.chat.completions.list(metadata={"b": "2"})] == [
        "chatcmpl-0000"
    ]
    gone = client.chat.completions.delete("chatcmpl-0000")
    assert (gone.id, gone.object, gone.deleted) == (
        "chatcmpl-0000",
        "chat.completion.deleted",
        True,
    )
    for call in (client.chat.completions.retrieve, client.chat.completions.delete):
        with pytest.raises(openai.NotFoundError) as fault:
            call("chatcmpl-0000")
        assert fault.value.param == "completion_id"


def test_another_project_sees_and_changes_nothing(
    client: openai.OpenAI, stranger: openai.OpenAI
) -> None:
    insert([record(0)])
    assert stranger.chat.completions.list().data == []
    completions = stranger.chat.completions
    for call in (
        lambda: completions.retrieve("chatcmpl-0000"),
        lambda: completions.update("chatcmpl-0000", metadata={}),
        lambda: completions.delete("chatcmpl-0000"),
        lambda: completions.messages.list("chatcmpl-0000"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert client.chat.completions.retrieve("chatcmpl-0000").id == "chatcmpl-0000"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"store": "yes"}, "store"),
        ({"metadata": {"key": 1}}, "metadata.key"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": "a\0b"}}, "metadata.k"),
    ],
)
def test_a_malformed_wish_to_store_is_refused_at_once(
    http: httpx.Client, changes: dict[str, Any], param: str
) -> None:
    answer = http.post("/v1/chat/completions", json=REQUEST | changes)
    assert answer.status_code == 400
    assert str(answer.json()["error"]["param"]).startswith(param)


def test_malformed_lists_and_updates_are_refused(http: httpx.Client) -> None:
    insert([record(0)])
    base = "/v1/chat/completions"
    for url, param in (
        (f"{base}?limit=0", "limit"),
        (f"{base}?order=newest", "order"),
        (f"{base}?created_after=today", "created_after"),
        (f"{base}?after=chatcmpl-none", "after"),
        (f"{base}?{'&'.join(f'metadata[{n}]=v' for n in range(17))}", "metadata"),
        (f"{base}?metadata[{'k' * 65}]=v", f"metadata[{'k' * 55}"),
        (f"{base}?models=m1", "models"),
        (f"{base}/chatcmpl-0000/messages?after=nothing", "after"),
    ):
        answer = http.get(url)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), url
    answer = http.post(f"{base}/chatcmpl-0000", json={})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata")


def test_reading_and_changing_need_the_scopes_for_files(service: Service) -> None:
    insert([record(0)])
    narrow = service.client(service.new_key(scopes=["inference"]))
    with narrow, pytest.raises(openai.PermissionDeniedError):
        narrow.chat.completions.list()
    with service.client(service.new_key(scopes=["files:read"])) as reader:
        assert len(reader.chat.completions.list().data) == 1
        with pytest.raises(openai.PermissionDeniedError):
            reader.chat.completions.delete("chatcmpl-0000")


def test_a_large_page_ends_early_and_the_client_reads_on(client: openai.OpenAI) -> None:
    insert([record(number, answer="x" * 900_000) for number in range(9)])
    page = client.chat.completions.list(limit=100)
    assert len(page.data) == 4
    assert len(list(client.chat.completions.list(limit=100))) == 9
