"""Conversations of stored completions, in the format of training rows."""

from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from worker.dataset.near_duplicates import normalised
from worker.dataset.personal_data import Masker

Json = dict[str, Any]  # Any: JSON of clients
Message = dict[str, Any]  # Any: the fields of a message, content as text
ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
INSTRUCTIONS: Final = frozenset({"system", "developer"})  # roles


class Unsuitable(Exception):
    """The answer cannot become a row. The only argument is the reason, as the report counts it."""


@dataclass(frozen=True)
class Conversation:
    """Messages, the last of which is the answer, and the tools that the request offered."""

    messages: list[Message]
    tools: list[Json]

    @classmethod
    def of(cls, record: Json, choice: int) -> "Conversation":
        """Returns the messages and tools of a record with one of its answers. Raises Unsuitable."""
        answer = record["completion"]["choices"][choice]["message"]
        messages = [_message(message) for message in [*record["messages"], answer]]
        if not any(message["role"] == "user" for message in messages):
            raise Unsuitable("no_user_message")
        return cls(messages, record["request"].get("tools") or [])

    @property
    def answer(self) -> str:
        """The answer as text, with its tool calls."""
        return _text(self.messages[-1])

    @property
    def question(self) -> str:
        """The first message of the user."""
        return next(_text(message) for message in self.messages if message["role"] == "user")

    def masked(self, masker: Masker) -> "Conversation":
        """Returns the conversation with its contents and tool calls masked. Tools stay as they are."""
        return replace(self, messages=[_masked(message, masker) for message in self.messages])

    def comparable_text(self) -> str:
        """Returns the text by which conversations are compared: all but the instructions.

        Many conversations share long instructions, which would make them all similar.
        """
        texts = [_text(m) for m in self.messages if m["role"] not in INSTRUCTIONS]
        return normalised("\n".join(texts))

    def row(self) -> Json:
        """Returns the conversation as a training row."""
        return {"messages": self.messages} | ({"tools": self.tools} if self.tools else {})


def identity(message: Message) -> bytes:
    """Returns what makes the message equal to another: all but white space and the ids of calls."""
    calls = [[name, arguments] for name, arguments in _calls(message)]
    content = " ".join(message["content"].split())
    return orjson.dumps([message["role"], content, *calls], option=orjson.OPT_SORT_KEYS)


def _message(message: Json) -> Message:
    role, calls = message["role"], message.get("tool_calls") or []
    if role not in ROLES or message.get("function_call"):
        raise Unsuitable("function_call")  # the deprecated form of tools
    content = message.get("content")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise Unsuitable("not_text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        content = ""
    if not content.strip() and not calls and role != "tool":
        raise Unsuitable("empty_message")
    shown: Message = {"role": role, "content": content}
    if calls:
        shown["tool_calls"] = [_call(call) for call in calls]
    if role == "tool":
        shown["tool_call_id"] = message["tool_call_id"]
    return shown


def _call(call: Json) -> Json:
    """Returns a tool call. Raises Unsuitable if its arguments are not a JSON object.

    A model can write any arguments, for example in an answer that was cut off. A row with them would
    be refused.
    """
    function = call["function"]
    try:
        arguments = orjson.loads(function["arguments"])
        orjson.dumps(arguments)  # fails if they are too deeply nested
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        raise Unsuitable("invalid_tool_call") from None
    if not isinstance(arguments, dict):
        raise Unsuitable("invalid_tool_call")
    named = {"name": function["name"], "arguments": function["arguments"]}
    return {"id": call["id"], "type": "function", "function": named}


def _calls(message: Message) -> list[tuple[str, Json]]:
    """Returns names and arguments of the tool calls of a message."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(function["name"], orjson.loads(function["arguments"])) for function in functions]


def _text(message: Message) -> str:
    calls = [
        f"{name} {orjson.dumps(arguments, option=orjson.OPT_SORT_KEYS).decode()}"
        for name, arguments in _calls(message)
    ]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


def _masked(message: Message, masker: Masker) -> Message:
    shown = {**message, "content": masker.mask(message["content"])}
    if calls := message.get("tool_calls"):
        shown["tool_calls"] = [_masked_call(call, masker) for call in calls]
    return shown


def _masked_call(call: Json, masker: Masker) -> Json:
    arguments = orjson.loads(call["function"]["arguments"])
    masked = orjson.dumps(_masked_value(arguments, masker)).decode()
    return {**call, "function": {**call["function"], "arguments": masked}}


def _masked_value(value: Any, masker: Masker) -> Any:  # Any: JSON
    """Returns a JSON value with its texts masked. A number that is masked becomes a text."""
    match value:
        case dict():
            return {masker.mask(key): _masked_value(item, masker) for key, item in value.items()}
        case list():
            return [_masked_value(item, masker) for item in value]
        case str():
            return masker.mask(value)
        case int() | float() if not isinstance(value, bool):
            masked = masker.mask(str(value))
            return value if masked == str(value) else masked
    return value
