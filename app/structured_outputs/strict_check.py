"""Rules of OpenAI's strict mode, with the messages of OpenAI."""

from typing import Any, Final

from app.errors import BadRequest
from app.structured_outputs.schema_check import Path, children

Json = Any  # Any: JSON of the client

MAX_STRICT_DEPTH: Final = 10


def check_strict(
    schema: dict[str, Json], *, subject: str, param: str, code: str = "invalid_json_schema"
) -> None:
    """Raises BadRequest if a checked schema breaks a rule of strict mode.

    Every object must forbid additional properties and require all its properties. `subject` names
    the schema in the message, for example `response_format 'Answer'`.
    """
    if schema.get("type") != "object":
        type_text = f'type: "{schema.get("type")}"'
        raise BadRequest(
            f"Invalid schema for {subject}: schema must be a JSON Schema of 'type: \"object\"', got '{type_text}'.",
            code,
            param,
        )
    waiting: list[tuple[Path, Json, int]] = [((), schema, 1)]
    while waiting:
        path, here, depth = waiting.pop()
        if not isinstance(here, dict):
            continue
        is_object = here.get("type") == "object" or "properties" in here
        if (fault := _fault(here) if is_object else None) is not None:
            raise BadRequest(
                f"Invalid schema for {subject}: In context={path}, {fault}", code, param
            )
        if depth > MAX_STRICT_DEPTH:
            raise BadRequest(
                f"Invalid schema for {subject}: {depth} levels of nesting exceeds limit of {MAX_STRICT_DEPTH}.",
                code,
                param,
            )
        inner = [
            (
                (*path, *steps),
                child,
                1 if steps[0] in ("$defs", "definitions") else depth + is_object,
            )
            for steps, child in children(here)
        ]
        waiting += reversed(inner)


def _fault(schema: dict[str, Json]) -> str | None:
    if schema.get("additionalProperties") is not False:
        return "'additionalProperties' is required to be supplied and to be false."
    required = set(schema.get("required", ()))
    for name in schema.get("properties", {}):
        if name not in required:
            return (
                "'required' is required to be supplied and to be an array including every key in "
                f"properties. Missing '{name}'."
            )
    return None
