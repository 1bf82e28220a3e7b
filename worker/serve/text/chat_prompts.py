"""Renders the messages and tools of a chat with the chat template of a model."""

import json
from collections.abc import Sequence
from typing import Any

from app.contracts.generation import GenerateRequest, Message, ToolCall, ToolUse
from worker.models.chat_templates import takes_tools, takes_tools_in_message
from worker.serve.errors import (
    InvalidMessages,
    NoChatTemplate,
    ToolMessagesUnsupported,
    ToolsUnsupported,
)
from worker.serve.text.template_process import RENDERER

Json = dict[str, Any]  # Any: JSON for chat templates


def chat_text(
    request: GenerateRequest,
    tokenizer: Any,  # transformers is untyped here
) -> str:
    """Returns the messages as rendered by the chat template, with the assistant's turn opened.

    The template comes with the model and is untrusted. A separate process renders it in an
    immutable sandbox. If the template does not mention the role "developer", the role becomes
    "system". Tools are shown to the model unless `choice` is none.

    Raises NoChatTemplate, ToolsUnsupported or InvalidMessages.
    """
    template = tokenizer.chat_template
    if not template:
        raise NoChatTemplate("this model has no chat template; use /v1/completions")
    tools = shown_tools(request.tool_use)
    messages = request.messages or ()
    has_calls = any(message.tool_calls or message.role == "tool" for message in messages)
    if (tools or has_calls) and not takes_tools(template):
        raise (ToolsUnsupported if tools else ToolMessagesUnsupported)(
            "the chat template of this model does not support tools; leave tools and tool calls out, or use another model"
        )
    try:
        chosen = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise InvalidMessages(f"the model has no default chat template: {error}") from error
    names: Json = {**json.loads(request.template_kwargs), **tokenizer.special_tokens_map}
    turns = turns_of(messages, has_developer="developer" in str(template))
    if tools:
        names["tools"] = tools
        if takes_tools_in_message(chosen):
            turns = with_tools_in_message(turns, tools)
    return RENDERER.render(chosen, turns, names)


def shown_tools(tool_use: ToolUse | None) -> list[Json] | None:
    """Returns the tools in the form that chat templates expect, or None if there are none.

    A tool without parameters takes an empty object.
    """
    if tool_use is None or tool_use.choice == "none":
        return None
    tools = []
    for tool in tool_use.tools:
        function: Json = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = (
            {"type": "object", "properties": {}}
            if tool.parameters is None
            else json.loads(tool.parameters)
        )
        tools.append({"type": "function", "function": function})
    return tools


def turns_of(messages: Sequence[Message], *, has_developer: bool) -> list[Json]:
    """Returns the messages in the form that chat templates expect.

    A tool message without a name gets the name of the tool that was called.
    """
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    turns = []
    for message in messages:
        is_system = message.role == "developer" and not has_developer
        turn: Json = {
            "role": "system" if is_system else message.role,
            "content": message.content or "",
        }
        if message.tool_calls:
            turn["tool_calls"] = [_turn_call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        if message.role == "tool" and (
            name := message.name or names.get(message.tool_call_id or "")
        ):
            turn["name"] = name
        turns.append(turn)
    return turns


def with_tools_in_message(turns: list[Json], tools: list[Json]) -> list[Json]:
    """Returns the turns with the functions as text in the system message, which is added if needed."""
    shown = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "tools": shown}, *turns[1:]]
    return [{"role": "system", "content": "", "tools": shown}, *turns]


def _turn_call(call: ToolCall) -> Json:
    """Returns a tool call with its arguments as an object. Other arguments stay text."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        arguments = call.arguments
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
