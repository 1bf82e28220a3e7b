"""POST /v1/responses over real HTTP, with a real serve worker and the unmodified openai client."""

import json
from typing import Any

import httpx
import openai
import pytest

from app.api import completions
from app.schemas.responses.answer import ResponseAnswer
from tests.serve_worker import WorkerProcess

PROMPT = "What does a lantern mean?"
REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"input": None}, 400, "invalid_value", ""),
    ({"input": []}, 400, "invalid_value", "input"),
    ({"input": [{"role": "robot", "content": "a"}]}, 400, "invalid_value", "input[0].role"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        400,
        "invalid_value",
        "input[0].content[0].type",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": {}}]}]},
        400,
        "invalid_value",
        "input[0].content[0].type",
    ),
    ({"input": [{"type": {}}]}, 400, "invalid_value", "input[0].type"),
    ({"input": [5]}, 400, "invalid_value", "input[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "invalid_value", "input[0].type"),
    (
        {"previous_response_id": "resp_1"},
        400,
        "previous_response_not_found",
        "previous_response_id",
    ),
    ({"conversation": "conv_1"}, 400, "unsupported_parameter", "conversation"),
    ({"background": True}, 400, "unsupported_parameter", "background"),
    ({"max_output_tokens": 100_000}, 400, "context_length_exceeded", "max_output_tokens"),
    ({"input": "word " * 2000}, 400, "context_length_exceeded", "input"),
    ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
    (
        {"tools": [{"type": "web_search"}, {"type": "function", "name": "a b"}]},
        400,
        "invalid_value",
        "tools[1].name",
    ),
    ({"temperature": 3.0}, 400, "invalid_value", "temperature"),
    ({"frequency": 1}, 400, "unknown_parameter", "frequency"),
    ({"model": "none"}, 404, "model_not_found", "model"),
]


def test_a_response_has_the_text_and_the_usage_of_the_same_chat(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    chat = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": PROMPT},
        ],
        max_tokens=24,
        temperature=0,
    )
    response = client.responses.create(
        model="tiny",
        instructions="Be brief.",
        input=PROMPT,
        max_output_tokens=24,
        temperature=0,
        metadata={"team": "x"},
        store=True,
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert (response.metadata, response.instructions) == ({"team": "x"}, "Be brief.")
    assert response.id.startswith("resp_")


def test_an_answer_that_max_output_tokens_cuts_is_incomplete(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    response = client.responses.create(
        model="tiny", input=PROMPT, max_output_tokens=2, extra_body={"ignore_eos": True}
    )
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].type == "message"
    assert response.output[0].status == "incomplete"


def test_the_events_of_a_stream_are_in_order_and_end_with_the_complete_response(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": PROMPT, "temperature": 0}
    options |= {"max_output_tokens": 24, "extra_body": {"ignore_eos": True}}
    response = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 3, "it came in one piece"
    assert "".join(deltas) == response.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == response.output_text
    assert last.response.usage is not None
    assert response.usage is not None
    assert last.response.usage.total_tokens == response.usage.total_tokens


def test_a_stream_that_waits_gets_events_that_keep_it_open(
    worker: WorkerProcess, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResponseAnswer, "first_event_seconds", 0.0)
    monkeypatch.setattr(completions, "PING_SECONDS", 0.002)
    options: dict[str, Any] = {"model": "tiny", "input": PROMPT, "max_output_tokens": 48}
    options |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    events = list(client.responses.create(**options, stream=True))
    kinds = [str(event.type) for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert "keepalive" in kinds
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == client.responses.create(**options).output_text


def test_the_stream_helper_of_the_client_accumulates_the_answer(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": PROMPT, "temperature": 0}
    with client.responses.stream(**options) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        # the answer of a random model does not end by itself
        with pytest.raises(RuntimeError, match="completed"):
            stream.get_final_response()
    assert texts[-1] == client.responses.create(**options).output_text


def test_logprobs_are_included_on_request(worker: WorkerProcess, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": PROMPT, "max_output_tokens": 6}
    plain = client.responses.create(**options, top_logprobs=2)
    assert plain.output[0].type == "message"
    assert plain.output[0].content[0].type == "output_text"
    assert not plain.output[0].content[0].logprobs
    options |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "temperature": 0}
    response = client.responses.create(**options)
    assert response.output[0].type == "message"
    part = response.output[0].content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert len(part.logprobs) == 6
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    streamed = [
        entry.token
        for event in client.responses.create(**options, stream=True)
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert streamed == [entry.token for entry in part.logprobs]


def test_items_of_earlier_answers_are_read_as_the_messages_of_a_chat(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    first = client.responses.create(model="tiny", input=PROMPT, max_output_tokens=4)
    replayed: Any = [item.to_dict() for item in first.output]
    reasoning: Any = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    response = client.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": PROMPT}]},
            reasoning,
            *replayed,
            {"type": "message", "role": "user", "content": "Go on."},
        ],
        max_output_tokens=4,
    )
    chat = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "Go on."},
        ],
        max_tokens=4,
    )
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens


def test_a_body_like_that_of_codex_is_answered(worker: WorkerProcess, http: httpx.Client) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Use tools."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        ],
        "tools": [
            {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark"}},
            {"type": "web_search"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "key",
        "client_metadata": {"a": "b"},
        "text": {"verbosity": "low"},
        "max_output_tokens": 4,
    }  # fmt: skip
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == 200
    frames = [frame.split("\n") for frame in answer.text.strip().split("\n\n")]
    assert all(len(frame) == 2 for frame in frames)
    events = [json.loads(frame[1].removeprefix("data: ")) for frame in frames]
    kinds = [frame[0].removeprefix("event: ") for frame in frames]
    assert kinds == [event["type"] for event in events]
    assert events[-1]["response"]["id"] == events[0]["response"]["id"]
    assert set(events[-1]["response"]["usage"]) >= {"input_tokens", "output_tokens", "total_tokens"}


@pytest.mark.parametrize(("changes", "status", "code", "param"), REFUSED)
def test_a_request_that_cannot_be_answered_is_refused_with_its_parameter(
    worker: WorkerProcess,
    client: openai.OpenAI,
    changes: dict[str, Any],
    status: int,
    code: str,
    param: str,
) -> None:
    body = {"model": "tiny", "input": PROMPT, **changes}
    with pytest.raises(openai.APIStatusError) as refused:
        client.post("/responses", body=body, cast_to=object)
    assert refused.value.status_code == status
    assert (refused.value.code, refused.value.param or "") == (code, param)


def test_a_stored_response_is_never_found(client: openai.OpenAI) -> None:
    for reach in (
        lambda: client.responses.retrieve("resp_1"),
        lambda: client.responses.delete("resp_1"),
        lambda: client.responses.cancel("resp_1"),
        lambda: client.responses.input_items.list("resp_1"),
    ):
        with pytest.raises(openai.NotFoundError, match="not stored"):
            reach()
