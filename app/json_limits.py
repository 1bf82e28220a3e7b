"""Limits on the shape of JSON from clients, checked before anything expensive is done with it.

Parsing and validating hold the interpreter lock from begin to end, in any thread, so that the event loop stands
still meanwhile. Arrays and objects are what costs; a long string costs next to nothing.
"""

from typing import Final

import orjson

from app.errors import BadRequest

# Before parsing; those inside strings count too.
MAX_BRACKETS: Final = 60_000
MAX_COLONS: Final = 100_000
MAX_COMMAS: Final = 500_000
# After parsing.
MAX_CONTAINERS: Final = 10_000  # arrays and objects
MAX_FIELDS: Final = 4096  # of one object
CONTAINERS: Final[frozenset[type]] = frozenset((dict, list))


def parse_limited(content: bytes) -> object:
    """The value, not yet checked by `refuse_crowded`. Raises JSONDecodeError or BadRequest."""
    if content.count(b"[") + content.count(b"{") > MAX_BRACKETS:
        raise _too_complex(f"{MAX_BRACKETS:,} brackets")
    if content.count(b":") > MAX_COLONS:
        raise _too_complex(f"{MAX_COLONS:,} colons")
    if content.count(b",") > MAX_COMMAS:
        raise _too_complex(f"{MAX_COMMAS:,} commas")
    value: object = orjson.loads(content)
    return value


def refuse_crowded(value: object) -> None:
    """Raises BadRequest if the value has too many arrays and objects, or an object too many fields."""
    waiting = [value] if type(value) in CONTAINERS else []
    num_containers = 0
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            if len(here) > MAX_FIELDS:
                raise _too_complex(f"{MAX_FIELDS:,} fields in one object")
            children: list[object] = list(here.values())
        else:
            assert isinstance(here, list)
            children = here
        if CONTAINERS.isdisjoint(map(type, children)):  # quick, for lists of many numbers
            continue
        found = [child for child in children if type(child) in CONTAINERS]
        num_containers += len(found)
        if num_containers > MAX_CONTAINERS:
            raise _too_complex(f"{MAX_CONTAINERS:,} arrays and objects")
        waiting += found


def _too_complex(limit: str) -> BadRequest:
    return BadRequest(f"the JSON has more than {limit}; send it in parts", "json_too_complex")
