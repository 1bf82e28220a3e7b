"""Checks at submission that a JSON Schema can be enforced, and that its size is bounded.

A keyword that no engine enforces is refused. It would otherwise be ignored in silence.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from app.errors import BadRequest
from app.structured_outputs.regex_check import check_regex

Json = Any  # Any: JSON of the client

MAX_BYTES: Final = 200_000
MAX_DEPTH: Final = 64
MAX_PROPERTIES: Final = 5_000
MAX_ENUM_VALUES: Final = 1_000
# Per object. The time of a mask grows with the number of properties that may come next.
MAX_OPTIONAL: Final = 500

TYPES: Final = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
FORMATS: Final = frozenset(
    {
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "time",
        "uri",
        "uuid",
    }
)
# Keywords that only describe a schema. `discriminator` is a hint beside `oneOf`.
ANNOTATIONS: Final = frozenset(
    {
        "$comment",
        "$schema",
        "default",
        "deprecated",
        "description",
        "discriminator",
        "examples",
        "readOnly",
        "title",
        "writeOnly",
    }
)
SCHEMA_MAPS: Final = frozenset({"$defs", "definitions", "patternProperties", "properties"})
SCHEMA_LISTS: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
SCHEMAS: Final = frozenset({"additionalProperties", "items"})
COUNTS: Final = frozenset(
    {"maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"}
)
NUMBERS: Final = frozenset(
    {"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"}
)

Path = tuple[str, ...]


def check_schema(
    schema: object,
    *,
    param: str,
    subject: str | None = None,
    code: str = "invalid_json_schema",
) -> str:
    """Returns the JSON text of a schema, with its keys in the given order.

    Raises BadRequest if the schema is too large, malformed, or has a keyword that cannot be
    enforced. `param` names the parameter that holds the schema. `subject` names the schema in
    messages, for example `function 'search'`.
    """
    subject = subject or param
    if not isinstance(schema, dict):
        message = f"Invalid schema for {subject}: it must be a JSON Schema object"
        raise BadRequest(message, code, param)
    text = orjson.dumps(schema)
    if len(text) > MAX_BYTES:
        raise BadRequest(
            f"the schema has {len(text):,} bytes, at most {MAX_BYTES:,} are allowed; use a smaller one",
            code,
            param,
        )
    _SchemaCheck(param, subject, code, schema).run()
    return text.decode()


@dataclass
class _SchemaCheck:
    """Check of one schema. The counts are of all its parts together."""

    param: str
    subject: str
    code: str
    root: Json
    num_properties: int = field(default=0, init=False)
    num_enum_values: int = field(default=0, init=False)

    def run(self) -> None:
        self._visit(self.root, (), 0)

    def _visit(self, schema: Json, path: Path, depth: int) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise self._error(path, "each schema must be an object or a boolean")
        if depth > MAX_DEPTH:
            raise self._error((), f"the schema has more than {MAX_DEPTH} levels of nesting")
        for keyword, value in schema.items():
            self._check(keyword, value, path)
        self._check_optional(schema, path)
        for steps, child in children(schema):
            self._visit(child, (*path, *steps), depth + 1)

    def _check(self, keyword: str, value: Json, path: Path) -> None:
        if keyword in SCHEMA_MAPS:
            self._check_map(keyword, value, path)
        elif keyword in SCHEMA_LISTS:
            if not isinstance(value, list) or not value:
                raise self._error(path, f"'{keyword}' must be a list of schemas")
        elif keyword in SCHEMAS:
            if isinstance(value, list):
                raise self._error(
                    path, f"'{keyword}' must be one schema; use 'prefixItems' for a list"
                )
        elif keyword in COUNTS:
            if not _is_count(value):
                raise self._error(path, f"'{keyword}' must be an integer of at least 0")
        elif keyword in NUMBERS:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._error(path, f"'{keyword}' must be a number")
            if keyword == "multipleOf" and value <= 0:
                raise self._error(path, "'multipleOf' must be above 0")
        elif keyword not in ANNOTATIONS:
            self._check_value(keyword, value, path)

    def _check_optional(self, schema: dict[str, Json], path: Path) -> None:
        properties = schema.get("properties", {})
        if len(properties) <= MAX_OPTIONAL:
            return
        if len(properties.keys() - set(schema.get("required", ()))) > MAX_OPTIONAL:
            raise self._error(
                path,
                f"an object has more than {MAX_OPTIONAL} optional properties; list them in 'required'",
            )

    def _check_map(self, keyword: str, value: Json, path: Path) -> None:
        if not isinstance(value, dict):
            raise self._error(path, f"'{keyword}' must be an object of schemas")
        if keyword in ("properties", "patternProperties"):
            self.num_properties += len(value)
            if self.num_properties > MAX_PROPERTIES:
                raise self._error((), f"the schema has more than {MAX_PROPERTIES:,} properties")
        if keyword == "patternProperties":
            for pattern in value:
                self._check_pattern(pattern, path)

    def _check_value(self, keyword: str, value: Json, path: Path) -> None:
        match keyword:
            case "type":
                kinds = value if isinstance(value, list) else [value]
                if not kinds or not all(isinstance(k, str) and k in TYPES for k in kinds):
                    raise self._error(path, f"'type' must be one or several of {sorted(TYPES)}")
            case "enum":
                if not isinstance(value, list) or not value:
                    raise self._error(path, "'enum' must be a list of values")
                self.num_enum_values += len(value)
                if self.num_enum_values > MAX_ENUM_VALUES:
                    raise self._error(
                        (), f"the schema has more than {MAX_ENUM_VALUES:,} enum values"
                    )
            case "const":
                pass
            case "required":
                if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                    raise self._error(path, "'required' must be a list of property names")
            case "pattern":
                self._check_pattern(value, path)
            case "format":
                if not isinstance(value, str) or value not in FORMATS:
                    raise self._error(
                        path, f"the format {value!r} is not supported; use one of {sorted(FORMATS)}"
                    )
            case "$ref":
                self._check_ref(value, path)
            case _:
                raise self._error(path, f"'{keyword}' is not supported; leave it out")

    def _check_pattern(self, value: Json, path: Path) -> None:
        if not isinstance(value, str):
            raise self._error(path, "'pattern' must be a string")
        try:
            check_regex(value, param=self.param)
        except BadRequest as error:
            raise self._error(path, error.message) from None

    def _check_ref(self, value: Json, path: Path) -> None:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise self._error(
                path, f"'$ref' must refer to a part of the same schema, not to {value!r}"
            )
        if resolve(self.root, value) is None:
            raise self._error(path, f"'$ref' refers to {value!r}, which does not exist")

    def _error(self, path: Path, message: str) -> BadRequest:
        return BadRequest(
            f"Invalid schema for {self.subject}: In context={path}, {message}",
            self.code,
            self.param,
        )


def children(schema: dict[str, Json]) -> Iterator[tuple[Path, Json]]:
    """Yields the schemas directly below a schema, each with the path to it."""
    for keyword, value in schema.items():
        if keyword in SCHEMA_MAPS and isinstance(value, dict):
            yield from (((keyword, name), child) for name, child in value.items())
        elif keyword in SCHEMA_LISTS and isinstance(value, list):
            yield from (((keyword, str(number)), child) for number, child in enumerate(value))
        elif keyword in SCHEMAS:
            yield (keyword,), value


def resolve(root: Json, ref: str) -> Json | None:
    """Returns the part of a schema to which a local `$ref` points, or None if there is none."""
    current = root
    for step in ref.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(current, dict) and name in current:
            current = current[name]
        elif isinstance(current, list) and name in map(str, range(len(current))):
            current = current[int(name)]
        else:
            return None
    return current if isinstance(current, dict | bool) else None


def _is_count(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
