"""Lists, reads, changes and deletes the stored completions of a project."""

from collections.abc import Mapping
from typing import Any, Final

import orjson

from app.db.pagination import Order
from app.db.schema.traffic_tables import StoredCompletion
from app.db.session import transaction
from app.db.traffic import completions
from app.db.traffic.completions import CompletionFilter
from app.errors import BadRequest, NotFound

PAGE_BYTES: Final = 4 * 2**20  # a page ends early if its completions have more
# Parameters of a request that are part of the stored completion, with OpenAI's name for each.
SHOWN: Final = {
    "user": "input_user",
    "service_tier": "service_tier",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "response_format": "response_format",
    "seed": "seed",
    "temperature": "temperature",
    "top_p": "top_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
Json = dict[str, Any]  # Any: parameters as the client sent them


def get_completion(project_id: str, completion_id: str) -> StoredCompletion:
    """Returns the project's stored completion with this id. Raises NotFound."""
    with transaction() as session:
        row = completions.find_completion(session, project_id, completion_id)
    if row is None:
        raise _unknown(completion_id)
    return row


def list_completions(
    project_id: str, wanted: CompletionFilter, *, after: str | None, limit: int, order: Order
) -> bytes:
    """Returns a page of stored completions as JSON. Raises UnknownCursor."""
    with transaction() as session:
        rows, has_more = completions.page_completions(
            session,
            project_id,
            wanted,
            after=after,
            limit=limit,
            order=order,
            most_bytes=PAGE_BYTES,
        )
    return page_json([completion_json(row) for row in rows], [row.id for row in rows], has_more)


def set_metadata(project_id: str, completion_id: str, metadata: Mapping[str, str]) -> bytes:
    """Replaces the metadata of a stored completion and returns it as JSON. Raises NotFound."""
    with transaction() as session:
        row = completions.set_metadata(session, project_id, completion_id, metadata)
    if row is None:
        raise _unknown(completion_id)
    return completion_json(row)


def delete_completion(project_id: str, completion_id: str) -> None:
    """Deletes a stored completion. Raises NotFound."""
    with transaction() as session:
        if not completions.delete_completions(session, project_id, [completion_id]):
            raise _unknown(completion_id)


def completion_json(row: StoredCompletion) -> bytes:
    """Returns a stored completion as JSON: the `chat.completion` with fields of its request."""
    request: Json = orjson.loads(row.request)
    shown = {name: request.get(key) for key, name in SHOWN.items()}
    fields = {
        **shown,
        "metadata": row.completion_metadata,
        "request_id": row.request_id,
        "latency_seconds": round(row.latency_seconds, 6),
    }
    # The stored text is not parsed: it may be long, and is JSON already.
    return row.completion.encode().removesuffix(b"}") + b"," + orjson.dumps(fields)[1:]


def messages_json(
    project_id: str, completion_id: str, *, after: str | None, limit: int, order: Order
) -> bytes:
    """Returns a page of the messages of a stored request as JSON.

    Raises NotFound, and BadRequest if no message has the id `after`.
    """
    row = get_completion(project_id, completion_id)
    messages = [
        message_object(f"{row.id}-{number}", message)
        for number, message in enumerate(orjson.loads(row.messages))
    ]
    if order == "desc":
        messages.reverse()
    if after is not None:
        ids = [message["id"] for message in messages]
        if after not in ids:
            raise BadRequest(f"nothing in this list has the id {after!r}", param="after")
        messages = messages[ids.index(after) + 1 :]
    page = messages[:limit]
    ids = [message["id"] for message in page]
    return page_json([orjson.dumps(m) for m in page], ids, len(messages) > limit)


def message_object(message_id: str, message: Json) -> Json:
    """Returns a message of a request as the API shows it.

    `content` is the complete text. `content_parts` has the parts if the client sent parts.
    """
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    text = content if parts is None else "".join(part.get("text", "") for part in parts)
    return {
        "name": None,
        "refusal": None,
        **message,
        "id": message_id,
        "content": text,
        "content_parts": parts,
    }


def page_json(items: list[bytes], ids: list[str], has_more: bool) -> bytes:
    """Returns a page of a list whose items are JSON already."""
    return orjson.dumps(
        {
            "object": "list",
            "data": [orjson.Fragment(item) for item in items],
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": has_more,
        }
    )


def _unknown(completion_id: str) -> NotFound:
    return NotFound(
        f"the stored completion {completion_id!r} does not exist; a completion can be read a moment "
        "after its answer if the request had store: true",
        param="completion_id",
    )
