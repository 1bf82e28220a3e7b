"""Tools in request bodies of /v1/chat/completions: their form, and what the model may do with them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.contracts.generation import Tool, ToolUse
from app.errors import BadRequest
from app.structured_outputs.schema_check import check_schema
from app.structured_outputs.strict_check import check_strict

Json = dict[str, Any]  # Any: JSON of the client
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
MAX_TOOLS = 128  # as in the OpenAI API
INVALID_PARAMETERS = "invalid_function_parameters"


class ToolPart(BaseModel):
    """Base class of the parts of a tool."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FunctionBody(ToolPart):
    """Function that the model may call. `parameters` is a JSON Schema."""

    name: ToolName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ToolBody(ToolPart):
    """Tool that the model may call."""

    type: Literal["function"]
    function: FunctionBody

    def tool(self) -> Tool:
        parameters = self.function.parameters
        return Tool(
            name=self.function.name,
            description=self.function.description,
            parameters=orjson.dumps(parameters).decode() if parameters else None,
            strict=bool(self.function.strict),
        )


class FunctionName(ToolPart):
    """Name of a function."""

    name: ToolName


class NamedTool(ToolPart):
    """Reference to a tool of the request."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(ToolPart):
    """Tools of the request that the model may call, or must call one of."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedChoice(ToolPart):
    """Restriction of the tools of the request."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolBodies = Annotated[list[ToolBody], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[NamedTool | AllowedChoice, Field(discriminator="type")]
)


def chosen_names(choice: ToolChoice | None) -> list[str]:
    """Returns the names of the tools to which a choice restricts the model, if it does."""
    if isinstance(choice, NamedTool):
        return [choice.function.name]
    if isinstance(choice, AllowedChoice):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return []


def tool_use_of(
    tools: Sequence[ToolBody], choice: ToolChoice | None, *, is_parallel: bool
) -> ToolUse | None:
    """Returns the tools that the model may call, or None if there are none."""
    names = chosen_names(choice)
    kept = tuple(tool.tool() for tool in tools if not names or tool.function.name in names)
    if not kept:
        return None
    if isinstance(choice, NamedTool):
        return ToolUse(tools=kept, choice="required", is_parallel=False)
    mode = choice.allowed_tools.mode if isinstance(choice, AllowedChoice) else choice
    return ToolUse(tools=kept, choice=mode or "auto", is_parallel=is_parallel)


def check_parameters(tools: Sequence[ToolBody]) -> None:
    """Raises BadRequest if the parameters of a tool are not the schema of an object.

    The schema of a strict tool must also obey the rules of strict mode, and have no keyword that
    cannot be enforced.
    """
    for number, tool in enumerate(tools):
        parameters, param = tool.function.parameters, f"tools[{number}].function.parameters"
        subject = f"function '{tool.function.name}'"
        if parameters and parameters.get("type") != "object":
            type_ = parameters.get("type")
            raise BadRequest(
                f"Invalid schema for {subject}: schema must be a JSON Schema of "
                f"'type: \"object\"', got 'type: \"{type_}\"'.",
                INVALID_PARAMETERS,
                param,
            )
        if parameters and tool.function.strict:
            try:
                check_schema(parameters, param=param)
            except BadRequest as error:
                message = error.message.replace(f"schema for {param}", f"schema for {subject}")
                raise BadRequest(message, INVALID_PARAMETERS, param) from None
            check_strict(parameters, subject=subject, param=param, code=INVALID_PARAMETERS)
