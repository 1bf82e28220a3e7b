"""Tool calls of /v1/responses over real HTTP, with the unmodified openai client."""

import json
from typing import Any

import openai

from tests.tool_model import ANSWER, ARGUMENTS, KEEPER, QUESTION, TOOL, result_of

Json = dict[str, Any]  # Any: JSON of the public API
FLAT = {"type": "function", **KEEPER["function"]}


def asking(model: str, **given: Any) -> Json:
    return {
        "model": model,
        "input": [{"role": "user", "content": QUESTION}],
        "tools": [{"type": "web_search"}, FLAT],
        "max_output_tokens": 80,
        "temperature": 0,
        **given,
    }


def test_a_tool_loop_of_two_turns_ends_with_an_answer(
    tool_model: str, client: openai.OpenAI
) -> None:
    request = asking(tool_model)
    first = client.responses.create(**request)
    assert first.status == "completed"
    assert first.output_text == "Let me ask. "
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == (TOOL, ARGUMENTS)
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": result_of(call.arguments),
    }
    items = [*request["input"], *first.output, result]
    second = client.responses.create(**{**request, "input": items})
    assert (second.status, second.output_text) == ("completed", ANSWER)
    counted = client.responses.input_tokens.count(
        model=tool_model, input=items, tools=request["tools"]
    )
    assert second.usage is not None
    assert counted.input_tokens == second.usage.input_tokens


def test_a_stream_has_the_items_of_the_whole_answer(tool_model: str, client: openai.OpenAI) -> None:
    request = asking(tool_model)
    response = client.responses.create(**request)
    with client.responses.stream(**request) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert [item.type for item in streamed.output] == ["message", "function_call"]
    assert streamed.output_text == response.output_text
    one, two = response.output[-1], streamed.output[-1]
    assert one.type == two.type == "function_call"
    assert (one.name, one.arguments) == (two.name, two.arguments)


def test_a_required_call_is_the_last_item(tool_model: str, client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "name": TOOL}):
        response = client.responses.create(**asking(tool_model, tool_choice=choice))
        assert response.output[-1].type == "function_call"
