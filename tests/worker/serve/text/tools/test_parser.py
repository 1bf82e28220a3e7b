"""Tool calls are found in the text of each format, however the text is divided."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.serve.text.tools import formats
from worker.serve.text.tools.formats import ToolFormat
from worker.serve.text.tools.parser import ToolParser

NAMES = {"weather", "add"}
CITY = '{"name": "weather", "arguments": {"city": "Bra{t}\\"isl\\u0101va"}}'
SUM = '{"name": "add", "parameters": {"a": 1, "b": [2, {"c": null}]}}'
CITY_ARGUMENTS = {"city": 'Bra{t}"islāva'}
SUM_ARGUMENTS = {"a": 1, "b": [2, {"c": None}]}
BOTH = [("weather", CITY_ARGUMENTS), ("add", SUM_ARGUMENTS)]
# For each format: a text with both calls, the calls, and the text that remains.
ANSWERS: dict[str, list[tuple[str, list[tuple[str, Any]], str]]] = {
    "hermes": [
        (
            f"\nI look.\n<tool_call>\n{CITY}\n</tool_call>\n<tool_call>{SUM}</tool_call>",
            BOTH,
            "\nI look.\n",
        ),
        (f"\n\n<tool_call>{CITY}</tool_call>\n", BOTH[:1], ""),
        (f"<tool_call>{CITY} done <b>", BOTH[:1], " done <b>"),
        (f"<tool_call>{CITY}</tool_call> and a < b", BOTH[:1], " and a < b"),
        ("a <tool_call> is a tag", [], "a <tool_call> is a tag"),
        (
            '<tool_call>{"name": "absent"}</tool_call>',
            [],
            '<tool_call>{"name": "absent"}</tool_call>',
        ),
        (f"<tool_call>{CITY[:-1]}</tool_call> so", [], f"<tool_call>{CITY[:-1]}</tool_call> so"),
        (
            f'<tool_call>{{"name": nothing}}<tool_call>{SUM}',
            BOTH[1:],
            '<tool_call>{"name": nothing}',
        ),
        (f"<tool_call>{CITY[:30]}", [], f"<tool_call>{CITY[:30]}"),
        ("  ", [], "  "),
    ],
    "granite3": [
        (f"<|tool_call|>[{CITY}, {SUM}]", BOTH, ""),
        (f"Well: <tool_call>[{CITY}]", BOTH[:1], "Well: "),
    ],
    "phi4": [
        (f"functools[{CITY}, {SUM}]", BOTH, ""),
        (f"<|tool_call|>[{CITY}]<|/tool_call|>", BOTH[:1], ""),
        ("use functools.reduce", [], "use functools.reduce"),
    ],
    "mistral_v3": [
        (f"[TOOL_CALLS] [{CITY}, {SUM}]", BOTH, ""),
        (
            '[TOOL_CALLS]weather{"city": "x"}[TOOL_CALLS]add[ARGS]{"a": 1}',
            [("weather", {"city": "x"}), ("add", {"a": 1})],
            "",
        ),
        ("see [TOOL_CALLS] and [TOO", [], "see [TOOL_CALLS] and [TOO"),
    ],
    "llama3": [
        (f"{CITY}; {SUM}", BOTH, ""),
        (f"<|python_tag|>{CITY}", BOTH[:1], ""),
        (f"So {CITY}", [], f"So {CITY}"),
        ('{"city": "x"} is JSON', [], '{"city": "x"} is JSON'),
        (f"{CITY} that was it", BOTH[:1], " that was it"),
        (f"{CITY}; then", BOTH[:1], "; then"),
    ],
    "json": [(f"[{CITY}, {SUM}]", BOTH, ""), ("[1] says so", [], "[1] says so")],
    "olmo": [
        (
            'Yes.\n<function_calls>\nweather(city="x")\nadd(a=-1, b=[true, None])\n</function_calls>',
            [("weather", {"city": "x"}), ("add", {"a": -1, "b": [True, None]})],
            "Yes.\n",
        ),
        ("<function_calls>[add(), weather(city='')]", [("add", {}), ("weather", {"city": ""})], ""),
        ("<function_calls>add(1)", [], "<function_calls>add(1)"),
        ("<function_calls>add(a=open('x'))", [], "<function_calls>add(a=open('x'))"),
        ("<function_calls>add(a=1)\nadd more", [("add", {"a": 1})], "\nadd more"),
    ],
    "lfm2": [
        ("<|tool_call_start|>[add(a={'b': 1})]<|tool_call_end|>", [("add", {"a": {"b": 1}})], "")
    ],
}
FORMATS = {each.name: each for each in vars(formats).values() if isinstance(each, ToolFormat)}
CASES = [(name, *case) for name, cases in ANSWERS.items() for case in cases]


def parsed(
    tool_format: ToolFormat, parts: Sequence[str], *, is_parallel: bool = True
) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer that arrives in these parts."""
    parser = ToolParser(tool_format, NAMES, is_parallel=is_parallel)
    results = [parser.feed(part) for part in parts]
    results.append(parser.end())
    calls = [call for result in results for call in result.calls]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return (
        "".join(result.text for result in results),
        [(call.name or "", json.loads(call.arguments)) for call in calls],
    )


def test_every_format_is_tested() -> None:
    assert ANSWERS.keys() == FORMATS.keys()


@pytest.mark.parametrize(("name", "text", "calls", "rest"), CASES)
def test_calls_are_found_and_the_rest_stays_text(
    name: str, text: str, calls: list[tuple[str, Any]], rest: str
) -> None:
    assert parsed(FORMATS[name], [text]) == (rest, calls)


@pytest.mark.parametrize(("name", "text", "calls", "rest"), CASES)
def test_an_answer_that_arrives_by_letters_gives_the_same(
    name: str, text: str, calls: list[tuple[str, Any]], rest: str
) -> None:
    assert parsed(FORMATS[name], list(text)) == (rest, calls)


PIECES = st.sampled_from(
    [
        CITY,
        SUM,
        CITY[:-2],
        "{",
        "}",
        "[",
        "]",
        "(",
        "weather",
        "add(a=1)",
        "add",
        '"',
        "'",
        "\\",
        " ",
        "\n",
        ";",
        "text",
        "<",
        "é",
        "nan",
        '{"name": "add"}',
        "[ARGS]",
        "[TOOL_CALLS",
        "<|",
        *sorted({mark for each in FORMATS.values() for mark in each.all_marks}),
    ]
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), pieces=st.lists(PIECES, max_size=12), data=st.data())
def test_every_division_of_any_text_gives_the_same(
    name: str, pieces: list[str], data: st.DataObject
) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    is_parallel = data.draw(st.booleans())
    expected = parsed(FORMATS[name], [text], is_parallel=is_parallel)
    assert parsed(FORMATS[name], parts, is_parallel=is_parallel) == expected
    assert parsed(FORMATS[name], list(text), is_parallel=is_parallel) == expected


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = ToolParser(formats.HERMES, NAMES, is_parallel=True)
    assert parser.feed("a <tool").text == "a "
    assert parser.feed("s").text == "<tools"


def test_a_call_is_returned_as_soon_as_it_is_complete() -> None:
    parser = ToolParser(formats.HERMES, NAMES, is_parallel=True)
    assert parser.feed("<tool_call>" + CITY[:-1]).calls == ()
    assert [call.name for call in parser.feed("}").calls] == ["weather"]


def test_without_parallel_calls_the_first_one_is_the_last() -> None:
    text = f"Hm. <tool_call>{CITY}</tool_call><tool_call>{SUM}</tool_call> end"
    assert parsed(formats.HERMES, [text], is_parallel=False) == ("Hm. ", BOTH[:1])
    assert parsed(formats.GRANITE, [f"<|tool_call|>[{CITY}, {SUM}]"], is_parallel=False) == (
        "",
        BOTH[:1],
    )


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "[" * 100_000 + "]" * 100_000])
def test_values_that_json_does_not_have_make_a_call_text(value: str) -> None:
    text = f'<tool_call>{{"name": "add", "arguments": {{"a": {value}}}}}</tool_call>'
    assert parsed(formats.HERMES, [text]) == (text, [])


def test_arguments_can_always_be_encoded() -> None:
    parser = ToolParser(formats.HERMES, NAMES, is_parallel=True)
    (call,) = parser.feed('<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}').calls
    assert json.loads(call.arguments.encode()) == {"a": "\ud800"}


def test_ids_have_the_length_that_mistrals_templates_demand() -> None:
    (call,) = ToolParser(formats.MISTRAL, NAMES, is_parallel=True).feed("[TOOL_CALLS]add{}").calls
    assert call.id is not None
    assert len(call.id) == 9
    assert call.id.isalnum()
