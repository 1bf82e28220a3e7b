"""Tool calls over real HTTP: a model that calls a tool, its result, and the answer."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.serve_worker import WorkerProcess
from tests.tool_model import ANSWER, ARGUMENTS, KEEPER, PARAMETERS, QUESTION, TOOL, USER, result_of

PATH = "/v1/chat/completions"
Json = dict[str, Any]  # Any: JSON of the public API


def asking(model: str, **given: Any) -> Json:
    return {
        "model": model,
        "messages": [USER],
        "tools": [KEEPER],
        "max_tokens": 80,
        "temperature": 0,
        **given,
    }


def strict(parameters: Json) -> Json:
    return {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}


def call_of(message: Any) -> Any:  # Any: the client's types of calls have no common fields
    """The only call of a message."""
    (call,) = message.tool_calls
    assert call.type == "function"
    return call


def test_a_tool_loop_of_two_turns_ends_with_an_answer(
    tool_model: str, client: openai.OpenAI
) -> None:
    first = client.chat.completions.create(**asking(tool_model)).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content == "Let me ask. "
    call = call_of(first.message)
    assert (call.function.name, json.loads(call.function.arguments)) == (TOOL, ARGUMENTS)
    result = {
        "role": "tool",
        "tool_call_id": call.id,
        "content": result_of(call.function.arguments),
    }
    messages = [USER, first.message, result]
    second = client.chat.completions.create(**asking(tool_model, messages=messages)).choices[0]
    assert (second.finish_reason, second.message.content) == ("stop", ANSWER)
    assert second.message.tool_calls is None


def test_streamed_calls_accumulate_to_the_whole_answer(
    tool_model: str, client: openai.OpenAI
) -> None:
    choices = client.chat.completions.create(**asking(tool_model, n=2)).choices
    with client.chat.completions.stream(**asking(tool_model, n=2)) as stream:
        events = [event.type for event in stream]
        streamed = stream.get_final_completion().choices
    assert "tool_calls.function.arguments.done" in events
    assert len(streamed) == len(choices) == 2
    for one, two in zip(choices, streamed, strict=True):
        assert one.message.content == two.message.content
        assert one.finish_reason == two.finish_reason
        call, other = call_of(one.message), call_of(two.message)
        assert call.function.name == other.function.name
        assert call.function.arguments == other.function.arguments
        assert other.id.startswith("call_")


def test_choice_none_hides_the_tools(tool_model: str, client: openai.OpenAI) -> None:
    request = asking(tool_model, tool_choice="none")
    hidden = client.chat.completions.create(**request)
    del request["tools"]
    without = client.chat.completions.create(**{**request, "tool_choice": "auto"})
    assert hidden.choices[0].message.tool_calls is None
    assert hidden.usage is not None
    assert without.usage is not None
    assert hidden.usage.total_tokens == without.usage.total_tokens
    assert hidden.choices[0].message.content == without.choices[0].message.content


def test_variables_of_the_client_reach_the_template(tool_model: str, client: openai.OpenAI) -> None:
    hint = {"chat_template_kwargs": {"hint": "Let me ask. "}}
    answer = client.chat.completions.create(**asking(tool_model), extra_body=hint).choices[0]
    assert answer.message.content is None
    assert answer.message.tool_calls is not None


def test_a_call_that_max_tokens_cuts_stays_text(tool_model: str, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**asking(tool_model, max_tokens=40)).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.tool_calls is None
    assert (answer.message.content or "").startswith("Let me ask. <tool_call>\n{")


def test_requests_as_langchain_writes_them_are_answered(
    tool_model: str, http: httpx.Client
) -> None:
    call = {"type": "function", "id": "a1", "function": {"name": TOOL, "arguments": '{"of": "house"}'}}  # fmt: skip
    body = asking(
        tool_model,
        stream=False,
        n=1,
        parallel_tool_calls=False,
        tools=[{"type": "function", "function": {**KEEPER["function"], "strict": False}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "the student", "tool_call_id": "a1"},
        ],
    )
    answer = http.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER


def test_messages_with_the_older_names_of_calls_are_answered(
    tool_model: str, client: openai.OpenAI
) -> None:
    older = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": TOOL, "arguments": json.dumps(ARGUMENTS)}},
        {"role": "function", "name": TOOL, "content": "the student"},
    ]  # fmt: skip
    answer = client.chat.completions.create(**asking(tool_model, messages=older)).choices[0]
    # the template shows both forms in the same way, except for the role of the result
    assert answer.message.content == ANSWER


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "invalid_value", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [KEEPER, KEEPER]}, "invalid_value", "tools"),
        ({"tools": [KEEPER] * 129}, "invalid_value", "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "invalid_function_parameters",
            "tools[0].function.parameters",
        ),
        ({"tools": [strict({"type": "object", "properties": {}})]}, "invalid_function_parameters", "tools[0].function.parameters"),
        ({"tools": [strict(PARAMETERS | {"not": {}})]}, "invalid_function_parameters", "tools[0].function.parameters"),
        ({"tools": None, "tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "absent"}}}, "invalid_value", "tool_choice"),
        ({"structured_outputs": {"regex": "a+"}}, "unsupported_parameter", "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "tool_choice": "required"}, "unsupported_parameter", "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: /a/"}}, "unsupported_parameter", "structured_outputs"),
        ({"parallel_tool_calls": "yes"}, "invalid_value", "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"chat_template_kwargs": {"tools": []}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "b" * 20_000}}, "invalid_value", "chat_template_kwargs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "missing_required_parameter", "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "invalid_value", "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "missing_required_parameter", "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": None}]}, "missing_required_parameter", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]},
            "invalid_value",
            "messages[0].tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}]}]},
            "invalid_value",
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
    ids=lambda given: str(given)[:60],
)  # fmt: skip
def test_a_bad_request_names_what_is_wrong(
    http: httpx.Client, register: Callable[..., str], change: Json, code: str, param: str
) -> None:
    response = http.post(PATH, json=asking(register()) | change)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)


def test_a_model_whose_template_shows_no_tools_refuses_them_at_once(
    http: httpx.Client, register: Callable[..., str]
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": TOOL, "arguments": "{}"}}
    model = register(takes_tools=False)
    bodies = {
        "tools": asking(model),
        "messages": asking(model, tools=[], messages=[USER, {"role": "assistant", "tool_calls": [call]}]),
    }  # fmt: skip
    for param, body in bodies.items():
        error = http.post(PATH, json=body).json()["error"]
        assert (error["code"], error["param"]) == ("tools_unsupported", param)


def test_a_model_of_an_older_version_refuses_tools_when_its_template_is_read(
    worker: WorkerProcess, http: httpx.Client
) -> None:
    response = http.post(PATH, json=asking("tiny"))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "tools_unsupported")
