"""What /openapi.json says of answers that FastAPI cannot see: errors, streams, bytes."""

from typing import Any

from pydantic import BaseModel

from app.schemas.errors import ErrorEnvelope

Responses = dict[int | str, dict[str, Any]]  # Any: as FastAPI has it

ERRORS: Responses = {
    "4XX": {
        "model": ErrorEnvelope,
        "description": "What is asked for cannot be done; `Retry-After` says when to try again",
    },
    "5XX": {
        "model": ErrorEnvelope,
        "description": "The service cannot do it now; `Retry-After` as above",
    },
}
TEXT = {"schema": {"type": "string"}}
FRAME = {  # of a stream; its last one has the data `[DONE]`
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


def whole_or_streamed(model: type[BaseModel]) -> Responses:
    """Of a route that answers as JSON, or with `stream` as server-sent events."""
    return {200: {"model": model, "content": {"text/event-stream": FRAME}}}
