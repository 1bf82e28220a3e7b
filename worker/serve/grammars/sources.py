"""Converts a grammar to the form that llguidance compiles, with the limits of its work."""

import json
from typing import Final

from llguidance import LLParserLimits, regex_to_lark

from app.contracts.generation import Grammar

# Limits of llguidance, in its own units. They bound the time of a compilation and of each mask, and
# the memory of a matcher.
LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    max_grammar_size=200_000,
    max_items_in_row=2_000,
    max_lexer_states=10_000,
    step_lexer_fuel=50_000,
    step_max_items=5_000,
    verbose_errors=False,
)
# Without this option, text that has only one form is divided into tokens by the tokenizer. That
# needs Python code in the middle of a mask. Any division into tokens is allowed instead.
HEADER: Final = '%llguidance {"no_forcing": true}\n'
# Models that may write white space between the parts of JSON often write nothing else.
JSON_OPTIONS: Final = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}
ASCII_CLASSES: Final = "d"  # as in Python, \d would match other digits too


def source_of(grammar: Grammar) -> str:
    """Returns a grammar in the Lark dialect of llguidance.

    JSON has no white space between its parts.
    """
    if grammar.kind == "json_schema":
        schema = json.loads(grammar.text) | {"x-guidance": JSON_OPTIONS}
        return f"{HEADER}start: %json {json.dumps(schema)}\n"
    if grammar.kind == "regex":
        return f"{HEADER}start: /{regex_to_lark(grammar.text, ASCII_CLASSES)}/\n"
    return HEADER + grammar.text
