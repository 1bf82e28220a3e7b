"""OpenAPI descriptions of responses that FastAPI cannot derive: errors, streams, binary data."""

from typing import Any

from pydantic import BaseModel

from app.schemas.errors import ErrorEnvelope

Responses = dict[int | str, dict[str, Any]]  # Any: FastAPI's own type

ERRORS: Responses = {
    "4XX": {
        "model": ErrorEnvelope,
        "description": "The request cannot be fulfilled; `Retry-After` says when to try again",
    },
    "5XX": {
        "model": ErrorEnvelope,
        "description": "The service cannot process the request now; `Retry-After` says when to try again",
    },
}
TEXT = {"schema": {"type": "string"}}
FRAME = {  # one server-sent event; the last event of a stream has the data `[DONE]`
    "schema": {
        "type": "object",
        "required": ["data"],
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    }
}
EVENTS: Responses = {200: {"content": {"text/event-stream": FRAME}}}
BYTES: Responses = {
    200: {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    }
}
MARKDOWN: Responses = {200: {"content": {"text/markdown": TEXT}}}
PART_OF_BYTES: Responses = {**BYTES, 206: {**BYTES[200], "description": "Part of the file"}}


def whole_or_streamed(model: type[BaseModel]) -> Responses:
    """Returns the description of a response that is JSON or, with `stream`, server-sent events."""
    return {200: {"model": model, "content": {"text/event-stream": FRAME}}}
