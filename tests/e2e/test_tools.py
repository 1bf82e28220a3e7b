"""Tool loops of the unmodified client against a running service."""

import json
import time
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.e2e.service import TEACHER, Service
from tests.tool_model import ANSWER, RESULT, TOOL, USER

pytestmark = pytest.mark.e2e
MODEL = "tool-caller"


class Keeper(BaseModel):
    """Names the keeper of something."""

    model_config = ConfigDict(title=TOOL)
    of: Literal["house", "still"]


STRICT: Any = openai.pydantic_function_tool(Keeper, name=TOOL)


@pytest.fixture(scope="module")
def model(service: Service, tool_model_dir: Path) -> str:
    service.cli("models", "import", str(tool_model_dir), "--name", MODEL)
    return MODEL


def result_of(call: Any) -> dict[str, str]:
    assert json.loads(call.function.arguments)["of"] in ("house", "still")
    return {"role": "tool", "tool_call_id": call.id, "content": RESULT}


@pytest.mark.parametrize("choice", ["required", "auto", "function"])
@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_a_tool_loop_round_trips(
    client: openai.OpenAI, model: str, choice: str, is_streamed: bool
) -> None:
    options: Any = {"model": model, "tools": [STRICT], "temperature": 0, "max_tokens": 80}
    tool_choice: Any = (
        {"type": "function", "function": {"name": TOOL}} if choice == "function" else choice
    )

    def ask(messages: list[Any], **given: Any) -> Any:  # Any: parsed choices of two kinds
        if not is_streamed:
            return client.chat.completions.parse(messages=messages, **options, **given).choices[0]
        with client.chat.completions.stream(messages=messages, **options, **given) as stream:
            return stream.get_final_completion().choices[0]

    first = ask([USER], tool_choice=tool_choice)
    assert first.finish_reason == ("stop" if choice == "function" else "tool_calls")
    assert first.message.content == ("Let me ask. " if choice == "auto" else None)
    (call,) = first.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Keeper)
    second = ask([USER, first.message, result_of(call)])
    assert (second.finish_reason, second.message.content) == ("stop", ANSWER)
    assert not second.message.tool_calls


def test_a_batch_returns_tool_calls(client: openai.OpenAI, model: str) -> None:
    body = {"model": model, "messages": [USER], "tools": [STRICT], "temperature": 0, "n": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = client.files.create(file=("b.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 240
    while batch.status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < deadline, batch.status
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id is not None, batch.errors
    answer = json.loads(client.files.content(batch.output_file_id).text)["response"]["body"]
    names = [c["message"]["tool_calls"][0]["function"]["name"] for c in answer["choices"]]
    assert names == [TOOL, TOOL]


def test_a_model_without_tools_in_its_template_refuses_them_at_once(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support tools") as refused:
        client.chat.completions.create(model=TEACHER, messages=[USER], tools=[STRICT])  # type: ignore[list-item]  # typed as a dict
    assert (refused.value.code, refused.value.param) == ("tools_unsupported", "tools")
