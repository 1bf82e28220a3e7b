"""Response models of the generation routes, only for /openapi.json.

The responses themselves are built as plain JSON by `app.schemas.answers`.
"""

from typing import Literal

from pydantic import BaseModel

from app.schemas.jobs import Json

FinishReason = Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    """Number of tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Json
    completion_tokens_details: Json


class TextChoice(BaseModel):
    """One generated text."""

    index: int
    text: str
    logprobs: Json | None
    finish_reason: FinishReason


class TextCompletion(BaseModel):
    """Response of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class AnswerFunction(BaseModel):
    """Name and arguments of a tool call. The arguments are JSON text."""

    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    """Tool call that the model has requested."""

    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(BaseModel):
    """Generated message of a chat. Without tool calls, the content is a string."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnswerToolCall] = []


class ChatChoice(BaseModel):
    """One generated message with the reason why it ended."""

    index: int
    message: AnswerMessage
    logprobs: Json | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ResponseUsage(BaseModel):
    """Number of tokens of a response."""

    input_tokens: int
    input_tokens_details: Json
    output_tokens: int
    output_tokens_details: Json
    total_tokens: int


class ResponseObject(BaseModel):
    """Response of /v1/responses. It also repeats the parameters of the request."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[Json]
    error: Json | None
    incomplete_details: Json | None
    usage: ResponseUsage
    parallel_tool_calls: bool
    tool_choice: str | Json
    tools: list[Json]
