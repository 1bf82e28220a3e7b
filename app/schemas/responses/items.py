"""Input items of /v1/responses, and their translation to the messages of a chat."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

Json = dict[str, Any]  # Any: a message of a chat, which `ChatBody` validates

# Items of earlier answers without text that the model has to read again.
SKIPPED_ITEMS: Final = frozenset(
    {
        "reasoning",
        "web_search_call",
        "file_search_call",
        "image_generation_call",
        "code_interpreter_call",
        "mcp_list_tools",
        "ghost_snapshot",
    }
)
SYSTEM_ROLES: Final = ("system", "developer")


class Lenient(BaseModel):
    """Base class of items. Unknown keys, such as `id`, `status` and `phase`, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class TextPart(Lenient):
    """Part of a content that is text."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class RefusalPart(Lenient):
    """Refusal in an earlier answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class OtherPart(Lenient):
    """Part of a content that the models of this service cannot read."""

    type: str

    @field_validator("type")
    @classmethod
    def _is_text(cls, value: str) -> str:
        raise ValueError(f"only text is supported, but this part is of type {value[:40]!r}")

    @property
    def text(self) -> str:
        raise AssertionError("such a part is refused")


# The names of the kinds differ from all keys of the items. Error paths leave them out.
def _kind_of_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal":
        return "refusal_part"
    # a tuple, because the kind may be an object, which no set can contain
    return "text_part" if kind in ("input_text", "output_text", "text") else "other_part"


def _kind_of_content(content: object) -> str:
    return "one_text" if isinstance(content, str) else "many_parts"


Part = Annotated[
    Annotated[TextPart, Tag("text_part")]
    | Annotated[RefusalPart, Tag("refusal_part")]
    | Annotated[OtherPart, Tag("other_part")],
    Discriminator(_kind_of_part),
]
Content = Annotated[
    Annotated[str, Tag("one_text")]
    | Annotated[list[Part], Field(fail_fast=True), Tag("many_parts")],
    Discriminator(_kind_of_content),
]


def text_of(content: Content) -> str:
    """Returns the text of a content, which is a string or a list of parts."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class MessageItem(Lenient):
    """Message of the user, of the developer, or of an earlier answer."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    def message(self) -> Json:
        return {"role": self.role, "content": text_of(self.content)}


class CallItem(Lenient):
    """Call of a function in an earlier answer."""

    call_id: str
    name: str
    arguments: str

    def message(self) -> Json:
        return _call(self.call_id, self.name, self.arguments)


class CustomCallItem(Lenient):
    """Call of a custom tool, whose input is plain text."""

    call_id: str
    name: str
    input: str

    def message(self) -> Json:
        return _call(self.call_id, self.name, orjson.dumps({"input": self.input}).decode())


class OutputItem(Lenient):
    """Result of a call."""

    call_id: str
    output: Content

    def message(self) -> Json:
        return {"role": "tool", "tool_call_id": self.call_id, "content": text_of(self.output)}


class SkippedItem(Lenient):
    """Item without a message. An item of an unknown type is refused."""

    type: str

    @field_validator("type")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in SKIPPED_ITEMS:
            raise ValueError(f"items of type {value[:40]!r} are not supported; leave this item out")
        return value

    def message(self) -> None:
        return None


def _kind_of_item(item: object) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind is None and isinstance(item, dict) and "role" in item:
        kind = "message"
    match kind:
        case "message" | "function_call" | "custom_tool_call":
            return f"{kind}_item"
        case "function_call_output" | "custom_tool_call_output":
            return "output_item"
    return "other_item"


def _kind_of_input(value: object) -> str:
    return "one_text" if isinstance(value, str) else "many_items"


Item = Annotated[
    Annotated[MessageItem, Tag("message_item")]
    | Annotated[CallItem, Tag("function_call_item")]
    | Annotated[CustomCallItem, Tag("custom_tool_call_item")]
    | Annotated[OutputItem, Tag("output_item")]
    | Annotated[SkippedItem, Tag("other_item")],
    Discriminator(_kind_of_item),
]
Input = Annotated[
    Annotated[str, Tag("one_text")]
    | Annotated[
        list[Item], Field(min_length=1, max_length=4096, fail_fast=True), Tag("many_items")
    ],
    Discriminator(_kind_of_input),
]


def messages_of(instructions: str | None, items: str | Sequence[Item]) -> list[Json]:
    """Returns the messages of a chat.

    Instructions and the system messages that follow them become one message, because many chat
    templates accept only one. Calls join the assistant's message before them.
    """
    messages: list[Json] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for item in items:
        message = item.message()
        if message is None:
            continue
        previous: Json = messages[-1] if messages else {"role": None}
        if len(messages) == 1 and previous["role"] == "system" and message["role"] in SYSTEM_ROLES:
            previous["content"] += f"\n\n{message['content']}"
        elif message["role"] == previous["role"] == "assistant" and "tool_calls" in message:
            previous.setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
    return messages


def _call(call_id: str, name: str, arguments: str) -> Json:
    function = {"name": name, "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}
