"""The parsers find every call that the grammars of tool calls allow."""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from app.contracts.generation import GenerateRequest, Grammar, Tool, ToolUse
from worker.serve.errors import ToolChoiceUnsupported, ToolsUnsupported
from worker.serve.text.tools import formats
from worker.serve.text.tools.formats import ToolFormat
from worker.serve.text.tools.grammars import answer_grammar, tool_grammar
from worker.serve.text.tools.parser import ToolParser

Make = Callable[..., GenerateRequest]
END = 256
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Wien", 'a "b" {c}', "[é]"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
        "note": {"type": ["string", "null"], "maxLength": 3},
    },
    "required": ["city", "days", "note"],
    "additionalProperties": False,
}  # fmt: skip
WEATHER = Tool(name="weather", parameters=json.dumps(SCHEMA), strict=True)
CLOCK = Tool(name="clock")
CONSTRAINED = [
    each
    for each in vars(formats).values()
    if isinstance(each, ToolFormat) and each.layout is not None
]


class Bytes:
    """A vocabulary of all bytes, an end token, and one token per mark of a format."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, marks: list[str]) -> None:
        self.marks = marks
        self.tokens = [bytes([value]) for value in range(256)] + [b""] * (1 + len(marks))
        self.eos_token_id = END
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())

    def special(self) -> dict[str, int]:
        return {mark: END + 1 + number for number, mark in enumerate(self.marks)}

    def text(self, tokens: list[int]) -> str:
        parts = [
            self.marks[token - END - 1].encode() if token > END else self.tokens[token]
            for token in tokens
        ]
        return b"".join(parts).decode(errors="replace")


def grammar_of(use: ToolUse, tool_format: ToolFormat, vocabulary: Bytes, **given: Any) -> Grammar:
    grammar = tool_grammar(use, tool_format, tuple(vocabulary.special().items()), **given)
    assert grammar is not None
    return grammar


def matcher_of(grammar: Grammar, vocabulary: Bytes) -> LLMatcher:
    matcher = LLMatcher(LLTokenizer(vocabulary), grammar.text)  # type: ignore[arg-type]  # untyped protocol
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def random_answer(grammar: Grammar, vocabulary: Bytes, seed: int, max_tokens: int = 600) -> str:
    """A random text that the grammar allows; it ends where the grammar first allows it, mostly."""
    rng = random.Random(seed)
    matcher = matcher_of(grammar, vocabulary)
    mask = allocate_token_bitmask(1, len(vocabulary.tokens))
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        fill_next_token_bitmask(matcher, mask)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[0]
        allowed = np.flatnonzero(bits[: len(vocabulary.tokens)]).tolist()
        assert allowed, "the grammar allows nothing"
        is_ending = END in allowed and (len(allowed) == 1 or rng.random() < 0.7)
        token = END if is_ending else rng.choice([t for t in allowed if t != END])
        if token == END:
            return vocabulary.text(tokens)
        matcher.consume_token(token)
        assert not matcher.is_error(), matcher.get_error()
        tokens.append(token)
    raise AssertionError(f"the answer did not end: {vocabulary.text(tokens)}")


def accepts(grammar: Grammar, text: str) -> bool:
    """Returns whether a text may be a complete answer. No mark is a token of its own."""
    vocabulary = Bytes([])
    matcher = matcher_of(grammar, vocabulary)
    tokens = list(text.encode())
    if matcher.validate_tokens(tokens) < len(tokens):
        return False
    matcher.consume_tokens(tokens)
    return matcher.is_accepting()


def parse(tool_format: ToolFormat, text: str, use: ToolUse) -> tuple[str, list[Any]]:
    names = {tool.name for tool in use.tools}
    parser = ToolParser(tool_format, names, is_parallel=use.is_parallel)
    first, last = parser.feed(text), parser.end()
    calls = [(call.name, json.loads(call.arguments)) for call in first.calls + last.calls]
    return first.text + last.text, calls


def parse_in_pieces(tool_format: ToolFormat, text: str, use: ToolUse, seed: int) -> list[Any]:
    """Calls of an answer that has calls only and arrives in random pieces."""
    rng = random.Random(seed)
    names = {tool.name for tool in use.tools}
    parser = ToolParser(tool_format, names, is_parallel=use.is_parallel, has_calls_only=True)
    calls: dict[int, list[str]] = {}
    while text and not parser.is_over:
        size = rng.randint(1, 5)
        parsed = parser.feed(text[:size])
        text = text[size:]
        assert parsed.text == ""
        for part in parsed.calls:
            assert (part.name is None) == (part.id is None) == (part.index in calls)
            calls.setdefault(part.index, [part.name or ""]).append(part.arguments)
    assert parser.end().text == ""
    return [(name, json.loads("".join(pieces))) for name, *pieces in calls.values()]


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    if name == "clock":
        assert arguments == {}
        return
    assert list(arguments) == ["city", "days", "note"]
    assert arguments["city"] in SCHEMA["properties"]["city"]["enum"]  # type: ignore[index]  # JSON
    assert len(arguments["days"]) <= 3
    assert all(isinstance(day, int) and 0 <= day <= 9 for day in arguments["days"])
    assert arguments["note"] is None or len(arguments["note"]) <= 3


@pytest.mark.parametrize("are_tokens", [True, False], ids=["marks are tokens", "marks are text"])
@pytest.mark.parametrize("is_parallel", [True, False], ids=["parallel", "single"])
@pytest.mark.parametrize("tool_format", CONSTRAINED, ids=lambda each: str(each.name))
def test_required_calls_are_always_found_and_valid(
    tool_format: ToolFormat, is_parallel: bool, are_tokens: bool
) -> None:
    use = ToolUse(tools=(WEATHER, CLOCK), choice="required", is_parallel=is_parallel)
    vocabulary = Bytes(sorted(tool_format.all_marks) if are_tokens else [])
    grammar = grammar_of(use, tool_format, vocabulary)
    numbers = set()
    for seed in range(12):
        answer = random_answer(grammar, vocabulary, seed)
        text, calls = parse(tool_format, answer, use)
        assert text == ""
        assert parse_in_pieces(tool_format, answer, use, seed) == calls
        for name, arguments in calls:
            check_arguments(name, arguments)
        numbers.add(len(calls))
    assert 0 not in numbers
    assert (max(numbers) > 1) == is_parallel


def test_strict_tools_are_constrained_after_any_text_and_others_are_not() -> None:
    use = ToolUse(tools=(WEATHER, CLOCK))
    grammar = grammar_of(use, formats.HERMES, Bytes([]))
    assert accepts(grammar, "")
    assert accepts(grammar, "No call <tool, \n only text")
    good = '<tool_call>\n{"name": "weather", "arguments": {"city": "Wien", "days": [1, 2], "note": null}}\n</tool_call>'
    assert accepts(grammar, f"Let me see. {good}")
    assert accepts(grammar, f"{good}\n{good} done")
    assert not accepts(grammar, f"Let me see. {good.replace('Wien', 'Graz')}")
    assert not accepts(grammar, good.replace("[1, 2]", "[1, 22]"))
    free = '<tool_call>\n{"name": "clock", "arguments": {"zone": {"a": [1.5]}}}\n</tool_call>'
    assert accepts(grammar, free)
    assert not accepts(grammar, free.replace("clock", "watch"))


def test_a_mark_that_is_a_token_begins_a_constrained_call_too() -> None:
    vocabulary = Bytes(["<tool_call>"])
    use = ToolUse(tools=(Tool(name="f", parameters=json.dumps(SCHEMA), strict=True),))
    matcher = matcher_of(grammar_of(use, formats.HERMES, vocabulary), vocabulary)
    mark = vocabulary.special()["<tool_call>"]
    begun = [*b"Let me see. ", mark, *b'\n{"name": "f", "arguments": {"city": "']
    assert matcher.validate_tokens(begun) == len(begun)
    matcher.consume_tokens(begun)
    assert matcher.validate_tokens(list(b"Wien")) == 4
    assert matcher.validate_tokens(list(b"Graz")) == 0


def test_a_format_without_marks_is_constrained_from_its_first_bracket() -> None:
    use = ToolUse(tools=(WEATHER,))
    grammar = grammar_of(use, formats.LLAMA3, Bytes([]))
    good = '{"name": "weather", "parameters": {"city": "Wien", "days": [], "note": "x"}}'
    assert accepts(grammar, good)
    assert accepts(grammar, f"{good}; {good}")
    assert accepts(grammar, "Plain text with {brackets}")
    assert accepts(grammar, "")
    assert not accepts(grammar, good.replace("Wien", "Graz"))
    assert not accepts(grammar, '{"answer": 1}')


def test_a_schema_for_the_answer_and_tools_exclude_each_other() -> None:
    use = ToolUse(tools=(CLOCK,))
    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False})  # fmt: skip
    own = Grammar(kind="json_schema", text=schema)
    grammar = grammar_of(use, formats.HERMES, Bytes([]), own=own)
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert accepts(grammar, '{"n": 5}')
    assert accepts(grammar, call)
    assert not accepts(grammar, f'{{"n": 5}}{call}')
    assert not accepts(grammar, "text")


def test_a_keyword_that_cannot_be_enforced_is_ignored_unless_the_tool_is_strict() -> None:
    parameters = json.dumps({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}})  # fmt: skip
    for is_strict in (False, True):
        tool = Tool(name="f", parameters=parameters, strict=is_strict)
        grammar = grammar_of(ToolUse(tools=(tool,), choice="required"), formats.HERMES, Bytes([]))
        is_error, _ = LLMatcher.validate_grammar_with_warnings(grammar.text)
        assert is_error == is_strict


def test_answers_are_free_where_nothing_is_promised(make_request: Make) -> None:
    def of(use: ToolUse | None, tool_format: ToolFormat | None = formats.HERMES) -> Grammar | None:
        return answer_grammar(make_request(messages=(), tool_use=use), tool_format, {})

    assert of(None) is None
    assert of(ToolUse(tools=(CLOCK,))) is None
    assert of(ToolUse(tools=(WEATHER,), choice="none")) is None
    assert of(ToolUse(tools=(WEATHER,)), None) is None
    assert of(ToolUse(tools=(WEATHER,))) is not None
    assert of(ToolUse(tools=(CLOCK,), choice="required")) is not None


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_grammar_that_was_built_stays(make_request: Make, choice: Any) -> None:
    """Engines build the grammar of a request more than once."""
    use = ToolUse(tools=(WEATHER,), choice=choice)
    built = answer_grammar(make_request(messages=(), tool_use=use), formats.HERMES, {})
    request = make_request(messages=(), tool_use=use, grammar=built)
    assert answer_grammar(request, formats.HERMES, {}) == built


def test_an_error_in_the_grammar_names_the_parameter_of_the_client(make_request: Make) -> None:
    for name in ("response_format", "structured_outputs"):
        own = Grammar(kind="json_schema", text="{}", param=name)
        request = make_request(messages=(), tool_use=ToolUse(tools=(CLOCK,)), grammar=own)
        grammar = answer_grammar(request, formats.HERMES, {})
        assert grammar is not None
        assert grammar.param == name
    request = make_request(messages=(), tool_use=ToolUse(tools=(WEATHER,)))
    grammar = answer_grammar(request, formats.HERMES, {})
    assert grammar is not None
    assert grammar.param == "tools"


@pytest.mark.parametrize("tool_format", [formats.OLMO, formats.LFM2])
def test_what_a_format_cannot_enforce_is_refused(
    make_request: Make, tool_format: ToolFormat
) -> None:
    def of(use: ToolUse, **given: Any) -> Grammar | None:
        return answer_grammar(make_request(messages=(), tool_use=use, **given), tool_format, {})

    own = Grammar(kind="json_schema", text="{}")
    with pytest.raises(ToolChoiceUnsupported, match="'auto'"):
        of(ToolUse(tools=(CLOCK,), choice="required"))
    with pytest.raises(ToolsUnsupported, match="strict") as refused:
        of(ToolUse(tools=(CLOCK, WEATHER)))
    assert refused.value.param == "tools"
    with pytest.raises(ToolsUnsupported, match="response_format"):
        of(ToolUse(tools=(CLOCK,)), grammar=own)
    assert of(ToolUse(tools=(CLOCK,))) is None
    assert of(ToolUse(tools=(WEATHER,), choice="none"), grammar=own) == own
