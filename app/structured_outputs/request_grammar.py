"""Converts the parameters of a request into the grammar of its answer."""

import re
from typing import Final

import orjson

from app.contracts.generation import Grammar
from app.errors import BadRequest
from app.schemas.chat.structured_outputs import ResponseFormat, StructuredOutputs
from app.structured_outputs.regex_check import check_regex
from app.structured_outputs.schema_check import check_schema
from app.structured_outputs.strict_check import check_strict

ANY_OBJECT: Final = Grammar(kind="json_schema", text='{"type":"object"}')
SPECIAL_CHARACTERS: Final = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")
# Options of llguidance inside a Lark grammar could weaken its limits.
LARK_OPTIONS: Final = re.compile(r"^\s*%llguidance\b", re.MULTILINE)


def request_grammar(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> Grammar | None:
    """Returns the grammar of an answer, or None if any text is allowed. Raises BadRequest."""
    if response_format is not None and response_format.type != "text":
        if structured_outputs is not None:
            raise BadRequest(
                "response_format and structured_outputs exclude each other; leave out one of them",
                param="structured_outputs",
            )
        return _format_grammar(response_format)
    return None if structured_outputs is None else _structured_grammar(structured_outputs)


def _format_grammar(response_format: ResponseFormat) -> Grammar:
    asked = response_format.json_schema
    if asked is None:
        return ANY_OBJECT
    subject, param = f"response_format '{asked.name}'", "response_format"
    if asked.schema_ is None:
        raise BadRequest(
            f"Invalid schema for {subject}: schema must be a JSON Schema of 'type: \"object\"', got 'type: \"None\"'.",
            "invalid_json_schema",
            param,
        )
    text = check_schema(asked.schema_, param=param, subject=subject)
    if asked.strict:
        check_strict(asked.schema_, subject=subject, param=param)
    return Grammar(kind="json_schema", text=text)


def _structured_grammar(asked: StructuredOutputs) -> Grammar:
    param = "structured_outputs"
    if asked.json_ is not None:
        text = check_schema(_parsed(asked.json_, param), param=param)
        return Grammar(kind="json_schema", text=text, param=param)
    if asked.regex is not None:
        check_regex(asked.regex, param=param)
        return Grammar(kind="regex", text=asked.regex, param=param)
    if asked.choice is not None:
        return Grammar(kind="regex", text="|".join(map(_escaped, asked.choice)), param=param)
    if asked.grammar is not None:
        if LARK_OPTIONS.search(asked.grammar):
            raise BadRequest(
                "%llguidance options are not supported in a grammar; leave them out", None, param
            )
        return Grammar(kind="lark", text=asked.grammar, param=param)
    return ANY_OBJECT.model_copy(update={"param": param})


def _parsed(schema: object, param: str) -> object:
    if not isinstance(schema, str):
        return schema
    try:
        return orjson.loads(schema)
    except orjson.JSONDecodeError as error:
        raise BadRequest(
            f"structured_outputs.json is not valid JSON: {error.msg}", None, param
        ) from None


def _escaped(text: str) -> str:
    return SPECIAL_CHARACTERS.sub(r"\\\g<0>", text)
