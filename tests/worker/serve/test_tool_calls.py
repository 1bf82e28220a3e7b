"""A random model is made to call tools, by the grammar of its answers."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from app.contracts.generation import Delta, Failure, GenerateRequest, Message, Reply, Tool, ToolUse
from tests.tiny import save_tiny, tiny_tokenizer
from tests.tool_model import TOOL_TEMPLATE
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.loading import LoadedModel, load_model

Make = Callable[..., GenerateRequest]
PARAMETERS = {
    "type": "object",
    "properties": {"day": {"type": "integer", "minimum": 0, "maximum": 9}, "at": {"enum": ["x", "yy"]}},
    "required": ["day", "at"],
    "additionalProperties": False,
}  # fmt: skip
HELLO = (Message(role="user", content="Who keeps the house?"),)
TOOL = Tool(name="f", parameters=json.dumps(PARAMETERS))


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random Llama whose chat template shows tools."""
    folder = save_tiny(tmp_path_factory.mktemp("caller") / "llama", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(folder)
    return load_model(folder)


def calls_of(replies: list[Reply], choice: int = 0) -> list[tuple[str, str]]:
    calls: dict[int, list[str]] = {}
    for delta in replies:
        for part in delta.tool_calls if isinstance(delta, Delta) and delta.choice == choice else ():
            name, arguments = calls.get(part.index, ["", ""])
            calls[part.index] = [name + (part.name or ""), arguments + part.arguments]
    return [(name, arguments) for name, arguments in calls.values()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_required_call_is_written_with_valid_arguments(
    caller: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Callable[[Engine], list[Reply]],
    temperature: float,
) -> None:
    engine = make_engine(caller)
    use = ToolUse(tools=(TOOL,), choice="required", is_parallel=False)
    given: Any = {"temperature": temperature, "seed": 1, "max_tokens": 100}
    engine.add(make_request(messages=HELLO, tool_use=use, n=3, **given))
    replies = drain(engine)
    for choice in range(3):
        deltas = [r for r in replies if isinstance(r, Delta) and r.choice == choice]
        assert "".join(delta.text for delta in deltas) == ""
        assert deltas[-1].finish_reason == "tool_calls"
        ((name, arguments),) = calls_of(replies, choice)
        assert name == "f"
        assert list(json.loads(arguments)) == ["day", "at"]
        assert json.loads(arguments)["day"] in range(10)
        assert json.loads(arguments)["at"] in ("x", "yy")
        assert sum(bool(delta.tool_calls) for delta in deltas) > 5, "it came in one piece"


def test_a_cut_call_keeps_the_arguments_that_were_written(
    caller: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Callable[[Engine], list[Reply]],
) -> None:
    engine = make_engine(caller)
    use = ToolUse(tools=(TOOL,), choice="required")
    engine.add(make_request(messages=HELLO, tool_use=use, max_tokens=48))
    replies = drain(engine)
    ((name, arguments),) = calls_of(replies)
    assert name == "f"
    assert arguments.startswith('{"day"')
    assert [r.finish_reason for r in replies if isinstance(r, Delta)][-1] == "length"


def test_stop_strings_and_stop_tokens_do_not_cut_a_required_call(
    caller: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Callable[[Engine], list[Reply]],
) -> None:
    engine = make_engine(caller)
    use = ToolUse(tools=(TOOL,), choice="required", is_parallel=False)
    quote = tuple(caller.tokenizer('"', add_special_tokens=False).input_ids)
    stops: tuple[Any, ...] = ({"stop": (",",)}, {"stop_token_ids": quote})
    for number, given in enumerate(stops):
        request_id = f"r{number}"
        engine.add(make_request(request_id, messages=HELLO, tool_use=use, max_tokens=100, **given))
        replies = drain(engine)
        ((name, arguments),) = calls_of(replies)
        assert (name, list(json.loads(arguments))) == ("f", ["day", "at"])
        reasons = [r.finish_reason for r in replies if isinstance(r, Delta)]
        assert reasons[-1] == "tool_calls"


def test_ignore_eos_is_refused_if_calls_are_enforced(
    caller: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Callable[[Engine], list[Reply]],
) -> None:
    engine = make_engine(caller)
    use = ToolUse(tools=(TOOL,), choice="required")
    engine.add(make_request(messages=HELLO, tool_use=use, ignore_eos=True))
    (failure,) = drain(engine)
    assert isinstance(failure, Failure)
    assert (failure.status, failure.param) == (400, "ignore_eos")
    free = ToolUse(tools=(TOOL,))
    engine.add(make_request(messages=HELLO, tool_use=free, ignore_eos=True))
    assert not any(isinstance(reply, Failure) for reply in drain(engine))
