"""Schemas that are accepted, and keywords that are refused by name."""

from typing import Any

import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, Field

from app.errors import BadRequest
from app.schemas.chat.structured_outputs import StructuredOutputs
from app.structured_outputs.request_grammar import request_grammar
from app.structured_outputs.schema_check import MAX_DEPTH, check_schema
from app.structured_outputs.strict_check import check_strict


class Part(BaseModel):
    size: int = Field(ge=0)
    note: str | None = None


class Whole(BaseModel):
    """A model with a reference, a reference with a sibling, a union and a recursion."""

    parts: list[Part]
    best: Part = Field(description="the best one")
    value: int | str | None
    inner: "Whole | None"


def refusal(schema: Any) -> BadRequest:  # Any: a schema, possibly malformed
    with pytest.raises(BadRequest) as caught:
        check_schema(schema, param="response_format")
    assert caught.value.param == "response_format"
    return caught.value


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_the_schemas_of_the_openai_client_are_accepted() -> None:
    schema = to_strict_json_schema(Whole)
    check_schema(schema, param="response_format")
    check_strict(schema, subject="response_format 'Whole'", param="response_format")


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {}}, "'not'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "array", "contains": {}}, "'contains'"),
        ({"propertyNames": {}}, "'propertyNames'"),
        ({"x-guidance": {}}, "'x-guidance'"),
        ({"items": [{}]}, "'prefixItems'"),
        ({"format": "phone"}, "'phone'"),
        ({"$ref": "https://example.com/schema"}, "'$ref'"),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"anyOf": [{"$ref": "#/anyOf/1"}]}, "does not exist"),
        ({"anyOf": [{"$ref": f"#/anyOf/{'9' * 5000}"}]}, "does not exist"),
        ({"pattern": "^(?!a)"}, "look-around"),
        ({"pattern": r"(a)\1"}, r"'\1'"),
        ({"type": "text"}, "'type'"),
        ({"minLength": -1}, "'minLength'"),
        ({"enum": list(range(1001))}, "enum values"),
        ({"properties": {f"p{i}": {} for i in range(501)}}, "optional properties"),
        (nested(MAX_DEPTH + 1), "levels of nesting"),
        ({"anyOf": {}}, "'anyOf'"),
        ("{}", "object"),
    ],
)
def test_what_cannot_be_enforced_is_named(schema: Any, word: str) -> None:
    assert word in refusal(schema).message


def test_a_deeply_nested_schema_in_a_string_is_refused() -> None:
    outputs = StructuredOutputs(json='{"const":' + "[" * 500 + "]" * 500 + "}")
    with pytest.raises(BadRequest, match="levels of nesting") as caught:
        request_grammar(None, outputs)
    assert caught.value.param == "structured_outputs"


def test_the_place_of_a_fault_is_named() -> None:
    fault = refusal({"properties": {"a": {"items": {"not": {}}}}})
    assert "In context=('properties', 'a', 'items')" in fault.message


def test_escaped_brackets_are_not_taken_for_a_group() -> None:
    check_schema({"pattern": r"\(?=a"}, param="response_format")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"type": "object", "properties": {}},
            "In context=(), 'additionalProperties' is required to be supplied and to be false.",
        ),
        (
            {"type": "object", "properties": {"b": {}}, "additionalProperties": False},
            "'required' is required to be supplied and to be an array including every key in properties. Missing 'b'.",
        ),
        ({"type": "array"}, "got 'type: \"array\"'."),
    ],
)
def test_strict_mode_has_the_messages_of_openai(schema: Any, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_strict(schema, subject="response_format 'A'", param="response_format")
    assert caught.value.message.startswith("Invalid schema for response_format 'A': ")
    assert caught.value.message.endswith(message)
