"""JSON that would take long to parse or to validate is refused before that."""

import json

import pytest

from app.errors import BadRequest
from app.json_limits import MAX_CONTAINERS, MAX_DEPTH, MAX_FIELDS, parse_limited, refuse_complex


def nested(num_levels: int) -> object:
    value: object = 0
    for _ in range(num_levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [[0] * 600_000, {str(number): 0 for number in range(101_000)}, [[]] * 61_000],
    ids=["values", "fields", "lists"],
)
def test_too_much_is_refused_before_it_is_parsed(value: object) -> None:
    with pytest.raises(BadRequest, match="more than"):
        parse_limited(json.dumps(value).encode())


@pytest.mark.parametrize(
    "value",
    [
        {"a": [0, {str(number): 0 for number in range(MAX_FIELDS + 1)}]},
        [0, [[{}] * (MAX_CONTAINERS - 1)]],
        nested(MAX_DEPTH + 1),
    ],
    ids=["fields", "containers", "levels"],
)
def test_crowded_values_are_refused_before_they_are_validated(value: object) -> None:
    with pytest.raises(BadRequest, match="more than"):
        refuse_complex(value)


def test_the_largest_prompts_pass() -> None:
    for value in (
        {"prompt": [1] * 400_000},
        {"messages": [{"role": "user"}] * 4096},
        {"prompt": "x," * 100_000},
        nested(MAX_DEPTH),
    ):
        content = parse_limited(json.dumps(value).encode())
        assert content == value
        refuse_complex(content)
