"""Limits on the structure of JSON from clients, checked before it is parsed and validated.

Parsing and validating hold the GIL without a break, even in another thread, and so block the event
loop. Their cost depends on the number of arrays and objects; long strings are cheap.
"""

from typing import Final

import orjson

from app.errors import BadRequest

# Limits before parsing. Characters inside strings count too.
MAX_BRACKETS: Final = 60_000
MAX_COLONS: Final = 100_000
MAX_COMMAS: Final = 500_000
# Limits after parsing.
MAX_CONTAINERS: Final = 10_000  # arrays and objects
MAX_FIELDS: Final = 4096  # per object
# orjson.dumps fails above 254 levels, and responses repeat parts of requests.
MAX_DEPTH: Final = 200
CONTAINERS: Final[frozenset[type]] = frozenset((dict, list))


def parse_limited(content: bytes) -> object:
    """Returns the parsed JSON value. The caller must check it with `refuse_complex`.

    Raises:
        BadRequest: The text has too many brackets, colons or commas.
        orjson.JSONDecodeError: The text is not valid JSON.
    """
    if content.count(b"[") + content.count(b"{") > MAX_BRACKETS:
        raise _too_complex(f"{MAX_BRACKETS:,} brackets")
    if content.count(b":") > MAX_COLONS:
        raise _too_complex(f"{MAX_COLONS:,} colons")
    if content.count(b",") > MAX_COMMAS:
        raise _too_complex(f"{MAX_COMMAS:,} commas")
    value: object = orjson.loads(content)
    return value


def refuse_complex(value: object) -> None:
    """Raises BadRequest if a value has too many arrays and objects, levels, or fields in one object."""
    level = [value] if type(value) in CONTAINERS else []  # the containers at one depth
    num_containers = depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_complex(f"{MAX_DEPTH:,} levels of nesting")
        inner: list[object] = []
        for here in level:
            inner += _inner_containers(here)
            if num_containers + len(inner) > MAX_CONTAINERS:
                raise _too_complex(f"{MAX_CONTAINERS:,} arrays and objects")
        num_containers += len(inner)
        level = inner


def _inner_containers(value: object) -> list[object]:
    """Returns the arrays and objects directly in a value. Raises BadRequest for too many fields."""
    if isinstance(value, dict):
        if len(value) > MAX_FIELDS:
            raise _too_complex(f"{MAX_FIELDS:,} fields in one object")
        children: list[object] = list(value.values())
    else:
        assert isinstance(value, list)
        children = value
    if CONTAINERS.isdisjoint(map(type, children)):  # a fast path for long lists of numbers
        return []
    return [child for child in children if type(child) in CONTAINERS]


def _too_complex(limit: str) -> BadRequest:
    return BadRequest(
        f"the JSON has more than {limit}; simplify it, or send it in parts", "json_too_complex"
    )
