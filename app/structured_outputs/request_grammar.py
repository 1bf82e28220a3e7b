"""Converts the parameters of a request into the grammar of its answer."""

import re
from typing import Final

import orjson

from app.contracts.generation import Grammar
from app.errors import BadRequest
from app.json_limits import parse_limited, refuse_complex
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
    schema_format = response_format.json_schema
    if schema_format is None:
        return ANY_OBJECT
    subject, param = f"response_format '{schema_format.name}'", "response_format"
    if schema_format.schema_ is None:
        raise BadRequest(
            f"Invalid schema for {subject}: schema must be a JSON Schema of 'type: \"object\"', got 'type: \"None\"'.",
            "invalid_json_schema",
            param,
        )
    text = check_schema(schema_format.schema_, param=param, subject=subject)
    if schema_format.strict:
        check_strict(schema_format.schema_, subject=subject, param=param)
    return Grammar(kind="json_schema", text=text)


def _structured_grammar(outputs: StructuredOutputs) -> Grammar:
    param = "structured_outputs"
    if outputs.json_ is not None:
        text = check_schema(_parsed(outputs.json_, param), param=param)
        return Grammar(kind="json_schema", text=text, param=param)
    if outputs.regex is not None:
        check_regex(outputs.regex, param=param)
        return Grammar(kind="regex", text=outputs.regex, param=param)
    if outputs.choice is not None:
        return Grammar(kind="regex", text="|".join(map(_escaped, outputs.choice)), param=param)
    if outputs.grammar is not None:
        if LARK_OPTIONS.search(outputs.grammar):
            raise BadRequest(
                "%llguidance options are not supported in a grammar; leave them out", None, param
            )
        return Grammar(kind="lark", text=outputs.grammar, param=param)
    return ANY_OBJECT.model_copy(update={"param": param})


def _parsed(schema: object, param: str) -> object:
    if not isinstance(schema, str):
        return schema
    try:
        content = parse_limited(schema.encode())
        refuse_complex(content)
    except orjson.JSONDecodeError as error:
        raise BadRequest(
            f"structured_outputs.json is not valid JSON: {error.msg}", None, param
        ) from None
    except BadRequest as error:
        error.param = param
        raise
    return content


def _escaped(text: str) -> str:
    return SPECIAL_CHARACTERS.sub(r"\\\g<0>", text)
