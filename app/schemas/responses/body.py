"""Request body of /v1/responses, and its translation to the body of a chat."""

import re
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.contracts.generation import Fraction, RepetitionPenalty, Temperature, TopK
from app.errors import BadRequest
from app.schemas.completions import ChatBody, ModelId, Unsupported, Unused
from app.schemas.responses.items import Input, messages_of
from app.schemas.validation_errors import bad_request

Json = dict[str, Any]  # Any: JSON of the client
LOGPROBS: Final = "message.output_text.logprobs"
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
# A tool of a chat. Tools are flat in this body.
TOOL_PARAM: Final = re.compile(r"tools\[(?P<number>\d+)\](\.function)?(?P<rest>[.\[].*)?")
# Parameters of a chat, and their names in this body.
RENAMED: Final = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "logprobs": "include",
}


class TextFormat(BaseModel):
    """Format of the answer's text: text, json_object or json_schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None

    def response_format(self) -> Json:
        """Returns the format as `response_format` of a chat."""
        if self.type != "json_schema":
            return {"type": self.type}
        fields = {"name": self.name, "description": self.description, "schema": self.schema_}
        given: Json = {key: value for key, value in fields.items() if value is not None}
        if self.strict is not None:
            given["strict"] = self.strict
        return {"type": "json_schema", "json_schema": given}


class TextOptions(BaseModel):
    """Options of the answer's text. `verbosity` has no effect."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: TextFormat | None = None
    verbosity: Unused = None


class PromptBody(BaseModel):
    """Parameters that decide what the model reads.

    Tools of unknown types are skipped, because agents offer tools of hosted services to all models.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    model: ModelId
    input: Input | None = None
    instructions: str | None = None
    text: TextOptions | None = None
    tools: Annotated[list[Json], Field(max_length=4096)] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: Unsupported = None
    reasoning: Unused = None
    truncation: Literal["auto", "disabled"] | None = None
    personality: Unused = None

    @model_validator(mode="after")
    def _has_input(self) -> "PromptBody":
        if self.input is None and not self.instructions:
            raise ValueError("input is missing")
        return self

    def refuse_state(self) -> None:
        """Raises BadRequest if the request refers to an earlier response or to a conversation."""
        if self.previous_response_id is not None:
            raise BadRequest(
                f"Previous response with id {self.previous_response_id!r} not found. Responses are not stored; "
                "send the earlier items in `input`.",
                "previous_response_not_found",
                "previous_response_id",
            )
        if self.conversation is not None:
            message = "conversations are not stored; send all items in `input`"
            raise BadRequest(message, "unsupported_parameter", "conversation")

    def chat(self) -> ChatBody:
        """Returns the body of the chat that has the same answer.

        Raises BadRequest, with the names of a chat. `renamed` changes them.
        """
        content = {key: value for key, value in self._chat().items() if value is not None}
        try:
            return ChatBody.model_validate(content)
        except ValidationError as error:
            details = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
            raise bad_request(details, content) from None

    def _chat(self) -> Json:
        """Returns the JSON of the chat. Values of None are left out of it."""
        chat: Json = {
            "model": self.model,
            "messages": messages_of(self.instructions, self.input or []),
        }
        if self.text is not None and self.text.format is not None:
            chat["response_format"] = self.text.format.response_format()
        tools = [_nested(tool) for _, tool in self._functions()]
        if tools:
            chat["tools"] = tools
            chat["tool_choice"] = self._tool_choice()
            chat["parallel_tool_calls"] = self.parallel_tool_calls
        elif self.tool_choice not in (None, "none", "auto"):
            message = "tool_choice demands a call, but `tools` has no function"
            raise BadRequest(message, param="tool_choice")
        return chat

    def _functions(self) -> list[tuple[int, Json]]:
        """Returns the tools that the chat has, each with its index in `tools`."""
        tools = enumerate(self.tools or ())
        return [(number, tool) for number, tool in tools if tool.get("type") == "function"]

    def renamed(self, error: BadRequest) -> BadRequest:
        """Returns the error of the chat with its `param` named as in this body."""
        param, error.param = error.param, self.renamed_param(error.param)
        if param is not None and error.param is not None and "[" in param:  # never a plain word
            error.message = error.message.replace(param, error.param)
        return error

    def renamed_param(self, param: str | None) -> str | None:
        """Returns the name in this body of a parameter of the chat."""
        if param is None:
            return None
        if (match := TOOL_PARAM.fullmatch(param)) is not None:
            number, _ = self._functions()[int(match["number"])]
            return f"tools[{number}]{match['rest'] or ''}"
        for name, ours in RENAMED.items():
            rest = param.removeprefix(name)
            if param.startswith(name) and rest[:1] in ("", ".", "["):
                # The index of a message is not that of an item.
                return ours if ours == "input" else ours + rest
        return param

    def _tool_choice(self) -> str | Json | None:
        match self.tool_choice:
            case {"type": "function", "name": name}:
                return {"type": "function", "function": {"name": name}}
            case {"type": "allowed_tools", "mode": mode, "tools": list(allowed)}:
                tools = [
                    {"type": "function", "function": {"name": tool.get("name")}}
                    for tool in allowed
                    if isinstance(tool, dict) and tool.get("type") == "function"
                ]
                return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
        return self.tool_choice


class ResponseBody(PromptBody):
    """Body of a request to /v1/responses."""

    max_output_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[str], Field(max_length=64)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    stream: bool | None = None
    background: Unsupported = None
    prompt: Unsupported = None

    # Parameters that OpenAI does not have, as in a chat.
    top_k: TopK | None = None
    min_p: Fraction | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - 128)] | None = None
    ignore_eos: bool = False

    store: Unused = None
    user: Unused = None
    stream_options: Unused = None
    max_tool_calls: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None
    prompt_cache_options: Unused = None
    service_tier: Unused = None
    client_metadata: Unused = None
    moderation: Unused = None

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def refuse_state(self) -> None:
        super().refuse_state()
        for name in ("background", "prompt"):
            if getattr(self, name):
                message = f"{name} is not supported; leave it out"
                raise BadRequest(message, "unsupported_parameter", name)

    def _chat(self) -> Json:
        chat = super()._chat() | {
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stream": self.stream,
        }
        if self.has_logprobs:
            chat |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return chat


def _nested(tool: Json) -> Json:
    """Returns a flat tool as a tool of a chat."""
    fields = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in fields if tool.get(name) is not None}
    return {"type": "function", "function": function}
