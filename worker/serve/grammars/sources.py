"""Converts a grammar to the form that llguidance compiles, with the limits of its work."""

from typing import Final

from llguidance import LLMatcher

from app.contracts.generation import Grammar

# Limits of llguidance, in its own units. They bound the time of a compilation and of each mask, and
# the memory of a matcher.
COMPILE_LIMITS: Final = {
    "initial_lexer_fuel": 1_000_000,
    "max_grammar_size": 200_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "verbose_errors": False,
}
# Models that may write white space between the parts of JSON often write nothing else.
JSON_OPTIONS: Final = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}


def source_of(grammar: Grammar) -> str:
    """Returns a grammar in the syntax of llguidance. JSON has no white space between its parts."""
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)
