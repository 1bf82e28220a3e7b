"""Converts the messages and tools of a training row into the form that chat templates expect."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from worker.models.chat_templates import takes_tools_in_message

Json = dict[str, Any]  # Any: JSON for chat templates


def turns_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Json, ...]:  # Any: a client's JSON
    """Returns the messages as turns, with the arguments of tool calls as objects.

    The deprecated `function_call` becomes a tool call, and the role `function` becomes `tool`. A
    tool message without a name gets that of the tool that was called. Raises KeyError, TypeError
    or ValueError if a message is malformed.
    """
    names: dict[str, str] = {}
    turns = []
    for message in messages:
        role = "tool" if message["role"] == "function" else message["role"]
        content = message.get("content")
        if content is None and role in ("assistant", "tool"):
            content = ""
        turn: Json = {"role": text_of(role), "content": content_of(content)}
        calls = [
            _call(call.get("id"), call["function"]) for call in message.get("tool_calls") or ()
        ]
        if (function := message.get("function_call")) is not None:
            calls.append(_call(None, function))
        if calls:
            turn["tool_calls"] = calls
            names |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}
        if role == "tool":
            call_id = message.get("tool_call_id")
            if call_id is not None:
                turn["tool_call_id"] = call_id
            if (name := message.get("name") or names.get(call_id or "")) is not None:
                turn["name"] = name
        turns.append(turn)
    return tuple(turns)


def tools_of(row: Mapping[str, Any]) -> tuple[Json, ...]:  # Any: a client's JSON
    """Returns the tools of a row. A tool without parameters takes an empty object."""
    functions = [tool["function"] for tool in row.get("tools") or ()]
    tools = []
    for function in functions or row.get("functions") or ():
        shown = {key: function[key] for key in ("name", "description") if function.get(key)}
        shown["parameters"] = function.get("parameters") or {"type": "object", "properties": {}}
        tools.append({"type": "function", "function": shown})
    return tuple(tools)


def content_of(content: object) -> str:
    """Returns the text of a message's content, which is a string or text parts. Raises TypeError."""
    if isinstance(content, list):
        return "".join(text_of(part["text"]) for part in content)
    return text_of(content)


def text_of(value: object) -> str:
    """Returns the value, which must be a string. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"text expected, not {type(value).__name__}")
    return value


def answer_text(turn: Json) -> str:
    """Returns an answer as text: its content, and its tool calls as JSON, one per line."""
    calls = [
        json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())
    ]
    return "\n".join([*([turn["content"]] if turn["content"] else []), *calls])


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Json],
    tools: Sequence[Json],
    *,
    is_question: bool,
) -> str:
    """Returns the turns as rendered by the chat template. `is_question` opens the next answer.

    The role "developer" becomes "system" if the template does not mention it, as in serving.
    """
    template = str(tokenizer.chat_template)
    shown = list(turns)
    if "developer" not in template:
        shown = [
            {**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in shown
        ]
    if tools and takes_tools_in_message(tokenizer.chat_template):
        shown = _with_tools_in_message(shown, tools)
    text = tokenizer.apply_chat_template(
        shown,
        tools=list(tools) or None,
        tokenize=False,
        add_generation_prompt=is_question,
    )
    return str(text)


def _with_tools_in_message(turns: list[Json], tools: Sequence[Json]) -> list[Json]:
    """Returns the turns with the functions as text in the system message, added if needed."""
    text = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "tools": text}, *turns[1:]]
    return [{"role": "system", "content": "", "tools": text}, *turns]


def _call(call_id: str | None, function: Mapping[str, Any]) -> Json:  # Any: a client's JSON
    arguments = json.loads(function["arguments"])
    call: Json = {
        "type": "function",
        "function": {"name": text_of(function["name"]), "arguments": arguments},
    }
    return call if call_id is None else {"id": call_id, **call}
