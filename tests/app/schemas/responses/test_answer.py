"""The events of /v1/responses, read by the accumulator of the unmodified openai client."""

from collections.abc import Sequence
from typing import Any

import httpx2
import openai
import pytest

from app.api.completions import events
from app.contracts.generation import Delta, Done, TokenLogprob, ToolCallDelta
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


def streamed(replies: Sequence[Delta | Done], **given: Any) -> bytes:
    answer = ResponseAnswer(ResponseBody(model="m", input="hi", **given), created=1)
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


def scored(token: str, text: str = "", *calls: ToolCallDelta) -> Delta:
    """One token with its log-probability."""
    entry = TokenLogprob(token=token, logprob=-1.0, bytes=tuple(token.encode()))
    return delta(text, *calls, logprobs=(entry,))


def test_log_probabilities_of_calls_open_no_message_and_no_call() -> None:
    replies: list[Delta | Done] = [
        scored("<call>"),
        scored("find", "", ToolCallDelta(index=0, id="call_a", name="find")),
        scored("{", "", ToolCallDelta(index=0, arguments="{")),
        scored(" "),
        scored("}", "", ToolCallDelta(index=0, arguments="}")),
        scored("</call>"),
        delta(finish_reason="tool_calls"),
        DONE,
    ]
    content = streamed(replies, include=["message.output_text.logprobs"])
    with client_of(content).responses.stream(model="m", input="hi") as stream:
        response = stream.get_final_response()
    (call,) = response.output
    assert call.type == "function_call"
    assert (call.call_id, call.name, call.arguments) == ("call_a", "find", "{}")


def test_a_message_has_the_log_probabilities_of_all_its_tokens() -> None:
    replies: list[Delta | Done] = [
        scored("<a>"),
        scored("Hi", "Hi"),
        scored("<b>"),
        delta(finish_reason="stop"),
        DONE,
    ]
    content = streamed(replies, include=["message.output_text.logprobs"])
    with client_of(content).responses.stream(model="m", input="hi") as stream:
        response = stream.get_final_response()
    (message,) = response.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.text == "Hi"
    assert [entry.token for entry in part.logprobs or ()] == ["<a>", "Hi", "<b>"]


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
    with pytest.raises(openai.APIError, match="the worker was lost") as failed:
        list(stream)
    assert (failed.value.code, failed.value.param) == ("worker_lost", "input")
    flat = answer.failure(error)[-1]
    assert (flat["type"], flat["code"], flat["param"]) == ("error", "worker_lost", "input")
