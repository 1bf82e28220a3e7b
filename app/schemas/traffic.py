"""Request and response bodies of stored completions."""

from typing import Literal

from pydantic import BaseModel

from app.schemas.generated import ChatChoice, Usage
from app.schemas.jobs import Body, Json, Metadata


class UpdateCompletion(Body):
    """Body of a request that replaces the metadata of a stored completion. Null removes it."""

    metadata: Metadata | None


class StoredCompletionObject(BaseModel):
    """A stored `chat.completion`, with its metadata and some parameters of its request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metadata: dict[str, str]
    request_id: str
    latency_seconds: float
    input_user: str | None = None
    service_tier: str | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    response_format: Json | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class StoredMessage(BaseModel):
    """A message of a stored request. `content_parts` is null unless the client sent parts."""

    id: str
    role: str
    content: str | None
    name: str | None
    refusal: str | None
    content_parts: list[Json] | None


class DeletedCompletion(BaseModel):
    """Response to the deletion of a stored completion."""

    id: str
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    deleted: Literal[True] = True
