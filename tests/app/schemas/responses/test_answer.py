"""The events of /v1/responses, read by the accumulator of the unmodified openai client."""

from collections.abc import Sequence
from typing import Any

import httpx2
import openai
import pytest

from app.api.completions import events
from app.contracts.generation import Delta, Done, ToolCallDelta
from app.errors import Unavailable
from app.schemas.responses.answer import ResponseAnswer
from app.schemas.responses.body import ResponseBody

DONE = Done(id="x", prompt_tokens=3, completion_tokens=5)


def delta(text: str = "", *calls: ToolCallDelta, **fields: Any) -> Delta:
    return Delta(id="x", choice=0, text=text, tool_calls=calls, **fields)


def client_of(content: bytes) -> openai.OpenAI:
    """A client that receives this stream from the network."""

    def reply(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=content, headers={"content-type": "text/event-stream"})

    transport = httpx2.MockTransport(reply)
    return openai.OpenAI(
        api_key="k", base_url="http://x/v1", http_client=httpx2.Client(transport=transport)
    )


def streamed(replies: Sequence[Delta | Done]) -> bytes:
    answer = ResponseAnswer(ResponseBody(model="m", input="hi"), created=1)
    parts = [events(answer.opening())]
    parts += [events(answer.chunks([(0, reply)])) for reply in replies]
    return b"".join(parts) + answer.ping() + events(answer.closing()) + answer.ending


def test_text_and_two_calls_become_three_items() -> None:
    replies: list[Delta | Done] = [
        delta("Let me "),
        delta("look."),
        delta("", ToolCallDelta(index=0, id="call_a", name="find")),
        delta("", ToolCallDelta(index=0, arguments='{"a":')),
        delta("", ToolCallDelta(index=0, arguments="1}")),
        delta("", ToolCallDelta(index=1, id="call_b", name="sum", arguments="{}")),
        delta(finish_reason="tool_calls"),
        DONE,
    ]
    with client_of(streamed(replies)).responses.stream(model="m", input="hi") as stream:
        seen = list(stream)
        response = stream.get_final_response()
    assert response.output_text == "Let me look."
    calls = [item for item in response.output if item.type == "function_call"]
    assert [(c.call_id, c.name, c.arguments) for c in calls] == [
        ("call_a", "find", '{"a":1}'),
        ("call_b", "sum", "{}"),
    ]
    numbers = [e.sequence_number for e in seen if "response" in e.type]
    assert numbers == sorted(set(numbers))
    done = [event for event in seen if event.type == "response.function_call_arguments.done"]
    assert [(event.to_dict()["name"], event.arguments) for event in done] == [
        ("find", '{"a":1}'),
        ("sum", "{}"),
    ]


def test_an_answer_without_text_has_an_empty_message() -> None:
    replies: list[Delta | Done] = [delta(finish_reason="stop"), DONE]
    with client_of(streamed(replies)).responses.stream(model="m", input="hi") as stream:
        response = stream.get_final_response()
    assert response.output_text == ""
    assert response.output[0].type == "message"


def test_an_error_in_a_stream_reaches_readers_of_both_forms() -> None:
    answer = ResponseAnswer(ResponseBody(model="m", input="hi"), created=1)
    error = Unavailable("the worker was lost", "worker_lost", "messages")
    content = events(answer.opening()) + events(answer.failure(error))
    stream = client_of(content).responses.create(model="m", input="hi", stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="the worker was lost") as failed:
        seen += list(stream)
    assert (failed.value.code, failed.value.param) == ("worker_lost", "input")
    flat = answer.failure(error)[-1]
    assert (flat["type"], flat["code"], flat["param"]) == ("error", "worker_lost", "input")
