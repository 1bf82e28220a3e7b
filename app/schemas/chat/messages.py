"""Messages in request bodies of /v1/chat/completions."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from app.contracts.generation import Message, ToolCall
from app.errors import BadRequest

Unused = Any  # a parameter of OpenAI that is accepted and has no effect
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
FieldValue = TypeVar("FieldValue")
MAX_CALLS = 128  # per message


class TextPart(BaseModel):
    """Text part of a message's content."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Unused = None


class CalledFunction(BaseModel):
    """Name and arguments of a call. The arguments are JSON text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Name
    arguments: str
    parsed_arguments: Unused = None


class MessageToolCall(BaseModel):
    """Tool call in an earlier message of the assistant."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: Name
    type: Literal["function"]
    function: CalledFunction
    index: Unused = None


class ChatMessage(BaseModel):
    """Message of a chat.

    Some fields must be null or empty. They are accepted because clients send an earlier answer back
    with all its fields. `function_call` and the role `function` are older names for one tool call
    and its result. The name of the function is then used as the id of the call.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    name: Name | None = Field(default=None, validate_default=True)
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_CALLS)] | None = None
    function_call: CalledFunction | None = None
    # Declared after the fields on which it depends, because a validator sees only those before.
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None, validate_default=True
    )
    tool_call_id: Name | None = Field(default=None, validate_default=True)
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    parsed: None = None
    audio: None = None

    @field_validator("name")
    @classmethod
    def _function_has_a_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _demand(value, info.data.get("role") == "function")

    @field_validator("tool_calls", "function_call")
    @classmethod
    def _only_assistants_call(
        cls, value: list[MessageToolCall] | CalledFunction | None, info: ValidationInfo
    ) -> list[MessageToolCall] | CalledFunction | None:
        if value and info.data.get("role", "assistant") != "assistant":
            raise ValueError("only messages of the assistant have calls")
        return value

    @field_validator("content")
    @classmethod
    def _has_content_or_calls(
        cls, value: str | list[TextPart] | None, info: ValidationInfo
    ) -> str | list[TextPart] | None:
        has_calls = info.data.get("tool_calls") or info.data.get("function_call")
        return _demand(value, not has_calls)

    @field_validator("tool_call_id")
    @classmethod
    def _only_results_have_a_call(cls, value: str | None, info: ValidationInfo) -> str | None:
        is_result = info.data.get("role") == "tool"
        if value is not None and not is_result:
            raise ValueError("only messages with the role 'tool' belong to a call")
        return _demand(value, is_result)

    def text(self) -> str | None:
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    def message(self) -> Message:
        is_function = self.role == "function"
        return Message(
            role=ROLES.get(self.role, self.role),
            content=self.text(),
            name=self.name if self.role in ("tool", "function") else None,
            tool_calls=tuple(self._calls()),
            tool_call_id=self.name if is_function else self.tool_call_id,
        )

    def _calls(self) -> list[ToolCall]:
        calls = [
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in self.tool_calls or ()
        ]
        if self.function_call is not None:
            old = self.function_call
            calls.append(ToolCall(id=old.name, name=old.name, arguments=old.arguments))
        return calls


# Chat templates do not know the role `developer`, OpenAI's newer name for `system`.
ROLES: dict[str, Any] = {"developer": "system", "function": "tool"}  # Any: the roles of `Message`


def _demand(value: FieldValue, is_required: bool) -> FieldValue:
    """Returns the value of a field. Raises if it is absent and required."""
    if value is None and is_required:
        raise PydanticCustomError("missing", "Field required")
    return value


def check_results(messages: Sequence[ChatMessage]) -> None:
    """Raises BadRequest if a tool message belongs to no call of an earlier message."""
    known: set[str] = set()
    for number, message in enumerate(messages):
        if message.tool_call_id is not None and message.tool_call_id not in known:
            raise BadRequest(
                "messages with role 'tool' must be a response to a preceding message with "
                f"'tool_calls'; there is no call {message.tool_call_id!r}",
                param=f"messages[{number}].tool_call_id",
            )
        known.update(call.id for call in message.tool_calls or ())
