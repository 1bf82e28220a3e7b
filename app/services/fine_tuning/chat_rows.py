"""Checks the rows with messages of a training file, in the format of OpenAI."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Row = dict[str, Any]  # Any: JSON values of a client

ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
ROW_KEYS: Final = frozenset({"messages", "tools", "parallel_tool_calls", "functions"})
MESSAGE_KEYS: Final = frozenset(
    {"role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call"}
)
MAX_IGNORED_KEYS: Final = 50  # names of ignored keys that are counted one by one
OTHER_KEYS: Final = "other keys"


class InvalidRow(ValueError):
    """A row is invalid. The message continues the sentence "line N is"."""


@dataclass
class RowDetails:
    """Counts of a file: keys that are ignored, by name, and rows that have tools or call them."""

    ignored_keys: Counter[str] = field(default_factory=Counter)
    num_rows_with_tools: int = 0
    num_rows_with_tool_calls: int = 0

    def ignore(self, keys: Iterable[str], prefix: str = "") -> None:
        """Counts keys that are not read."""
        for key in keys:
            shown = key.encode("ascii", "backslashreplace").decode()[:64]
            name = f"{prefix}{shown if shown.isprintable() else ascii(shown)}"
            is_new = name not in self.ignored_keys
            if is_new and len(self.ignored_keys) >= MAX_IGNORED_KEYS:
                name = OTHER_KEYS
            self.ignored_keys[name] += 1

    def as_json(self) -> Row | None:
        """Returns the counts that are not zero, or None if all are."""
        counts = {
            "ignored_keys": dict(self.ignored_keys),
            "num_rows_with_tools": self.num_rows_with_tools,
            "num_rows_with_tool_calls": self.num_rows_with_tool_calls,
        }
        return {name: value for name, value in counts.items() if value} or None


def check_chat(row: Row, details: RowDetails) -> str:
    """Returns `chat` if the conversation ends with an answer, or else `chat_prompt`.

    Raises InvalidRow.
    """
    details.ignore(used(row).keys() - ROW_KEYS)
    has_tools = _check_tools(row)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise InvalidRow("invalid: messages must be a list with at least one message")
    has_calls = False
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or "role" not in message:
            raise InvalidRow(f"invalid: {where} must be an object with role and content")
        details.ignore(used(message).keys() - MESSAGE_KEYS, "messages[].")
        has_calls |= _check_message(message, where)
    details.num_rows_with_tools += has_tools
    details.num_rows_with_tool_calls += has_calls
    return _format_of(messages)


def used(values: Mapping[str, Any]) -> Row:
    """Returns the entries that are not null. A key that is null counts as absent."""
    return {key: value for key, value in values.items() if value is not None}


def _format_of(messages: list[Row]) -> str:
    roles = [message["role"] for message in messages]
    if "user" not in roles[:-1] and roles[-1] != "user":
        raise InvalidRow("invalid: messages has no user message")
    if roles[-1] in ("system", "developer"):
        raise InvalidRow("invalid: the last message must have the role user, assistant or tool")
    if roles[-1] != "assistant":
        return "chat_prompt"
    weights = [m.get("weight") for m in messages if m["role"] == "assistant"]
    if all(weight == 0 and weight is not None for weight in weights):
        raise InvalidRow("invalid: all answers have weight 0; give an answer weight 1")
    return "chat"


def _check_message(message: Row, where: str) -> bool:
    """Returns whether the message calls tools. Raises InvalidRow."""
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise InvalidRow(f"invalid: {where}.role must be one of {', '.join(ROLES)}")
    has_calls = _check_calls(message, where)
    if has_calls and role != "assistant":
        raise InvalidRow(f"invalid: {where} calls a tool, but only an assistant message can")
    if message.get("weight") not in (0, 1, None):
        raise InvalidRow(f"invalid: {where} has a weight that is not 0 or 1")
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key) or "", str):
            raise InvalidRow(f"invalid: {where}.{key} must be a string")
    for text in texts_of_content(content, where):
        check_encodable(text, f"{where}.content")
    may_be_empty = has_calls or role in ("tool", "function")
    if content is None and not may_be_empty:
        raise InvalidRow(f"invalid: {where} has no content")
    if not may_be_empty and not "".join(texts_of_content(content, where)).strip():
        raise InvalidRow(f"invalid: {where}.content is empty")
    return has_calls


def texts_of_content(content: object, where: str) -> list[str]:
    """Returns the texts of a message's content: a string, text parts or null. Raises InvalidRow."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise InvalidRow(f"invalid: {where}.content must be a string or a list of text parts")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in ("image_url", "input_audio", "file"):
            raise InvalidRow(
                f"invalid: {where}.content has a part of type {part['type']}, but only text is supported"
            )
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InvalidRow(f'invalid: {where}.content has a part that is not {{"type": "text"}}')
        texts.append(part["text"])
    return texts


def _check_calls(message: Row, where: str) -> bool:
    """Returns whether the message calls tools, also in the deprecated form. Raises InvalidRow."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise InvalidRow(f"invalid: {where}.tool_calls must be a list")
    functions = []
    for number, call in enumerate(calls):
        place = f"{where}.tool_calls[{number}]"
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise InvalidRow(f'invalid: {place} must be {{"id", "type": "function", "function"}}')
        if not isinstance(call.get("id") or "", str):
            raise InvalidRow(f"invalid: {place}.id must be a string")
        functions.append((call["function"], f"{place}.function"))
    if (call := message.get("function_call")) is not None:
        functions.append((call, f"{where}.function_call"))
    for function, place in functions:
        _check_call(function, place)
    return bool(functions)


def _check_call(function: object, place: str) -> None:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRow(f"invalid: {place} must be an object with name and arguments")
    arguments = function.get("arguments")
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRow(f"invalid: {place}.arguments must be a string with a JSON object")
    check_encodable(function["name"] + str(arguments), place)


def _check_tools(row: Row) -> bool:
    """Returns whether the row has tools, also in the deprecated form. Raises InvalidRow."""
    tools, functions = row.get("tools"), row.get("functions")
    if tools and functions:
        raise InvalidRow("invalid: it has tools and functions; give tools only")
    for name, values in (("tools", tools), ("functions", functions)):
        if values is not None and not isinstance(values, list):
            raise InvalidRow(f"invalid: {name} must be a list")
    declared = [tool.get("function") if isinstance(tool, dict) else None for tool in tools or ()]
    for number, function in enumerate([*declared, *(functions or ())]):
        place = f"tools[{number}].function" if tools else f"functions[{number}]"
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRow(f"invalid: {place} must be an object with a name")
        if not isinstance(function.get("parameters") or {}, dict):
            raise InvalidRow(f"invalid: {place}.parameters must be an object")
        check_encodable(json.dumps(function, ensure_ascii=False), place)
    if not isinstance(row.get("parallel_tool_calls") or False, bool):
        raise InvalidRow("invalid: parallel_tool_calls must be true or false")
    return bool(tools or functions)


def check_encodable(text: str, name: str) -> None:
    """Raises InvalidRow if the text has an unpaired surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRow(
            f"invalid: {name} contains an unpaired surrogate, which is not a character"
        ) from None


def texts_of_message(message: Row) -> list[str]:
    """Returns the texts of a checked message that a chat template renders."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    if message.get("function_call") is not None:
        functions.append(message["function_call"])
    calls = [text for function in functions for text in (function["name"], function["arguments"])]
    return [*texts_of_content(message.get("content"), ""), *calls]


def texts_of_tools(row: Row) -> list[str]:
    """Returns the tools of a checked row as JSON texts."""
    tools = row.get("tools") or row.get("functions") or ()
    return [json.dumps(tool, ensure_ascii=False) for tool in tools]
