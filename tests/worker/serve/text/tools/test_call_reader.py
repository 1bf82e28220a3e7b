"""Answers that should have calls only: their arguments are sent in pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.serve.text.tools import formats
from worker.serve.text.tools.formats import ToolFormat
from worker.serve.text.tools.parser import ToolParser

NAMES = {"add", "ad"}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "}", "b": [1]}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "ad", "arguments": {}}\n</tool_call>'


def parser_of(tool_format: ToolFormat = formats.HERMES, *, is_parallel: bool = True) -> ToolParser:
    return ToolParser(tool_format, NAMES, is_parallel=is_parallel, has_calls_only=True)


def test_arguments_are_returned_while_they_are_written() -> None:
    parser = parser_of()
    (header,) = parser.feed(CALL[: CALL.index('{"a"')]).calls
    assert (header.index, header.name, header.arguments) == (0, "add", "")
    assert header.id is not None
    (piece,) = parser.feed('{"a": "').calls
    assert (piece.index, piece.id, piece.name, piece.arguments) == (0, None, None, '{"a": "')
    assert parser.feed('}"').calls[0].arguments == '}"'


def test_without_parallel_calls_the_answer_is_over_with_its_first_arguments() -> None:
    parser = parser_of(is_parallel=False)
    parser.feed(CALL[: CALL.rindex("}}")])
    assert not parser.is_over
    assert parser.feed("}").calls[0].arguments == "}"
    assert parser.is_over


def test_a_cut_call_keeps_its_arguments_so_far() -> None:
    parser = parser_of()
    parts = parser.feed(CALL[: CALL.index("[1]")]).calls
    assert "".join(part.arguments for part in parts) == '{"a": "}", "b": '
    assert parser.end() == ("", ())


@pytest.mark.parametrize("text", ["Plain text", "<tool", "", CALL[:20]])
def test_an_answer_that_is_no_call_stays_text(text: str) -> None:
    parser = parser_of()
    parsed = parser.feed(text).then(parser.end())
    assert (parsed.text, parsed.calls) == (text, ())


def test_an_answer_with_another_layout_is_parsed_like_any_other() -> None:
    parser = parser_of()
    parsed = parser.feed('Hm. <tool_call>{"name": "add", "arguments": {}}</tool_call>')
    assert (parsed.text, [call.name for call in parsed.calls]) == ("Hm. ", ["add"])


def test_text_after_the_calls_is_text() -> None:
    parser = parser_of()
    parsed = parser.feed(f"{CALL} and more").then(parser.end())
    assert [call.name for call in parsed.calls if call.name] == ["add"]
    assert "and more" in parsed.text


PIECES = st.sampled_from([CALL, OTHER, "\n", CALL[:40], " text", "}", '"', "<tool_call>"])


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(PIECES, max_size=6), data=st.data())
def test_every_division_gives_the_same(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def summary(parts: list[str]) -> tuple[str, dict[int, list[str]]]:
        """Text, and for each call its name and arguments."""
        parser = parser_of()
        results = [parser.feed(part) for part in parts]
        results.append(parser.end())
        calls: dict[int, list[str]] = {}
        for call in (call for result in results for call in result.calls):
            name, arguments = calls.get(call.index, ["", ""])
            calls[call.index] = [name + (call.name or ""), arguments + call.arguments]
        return "".join(result.text for result in results), calls

    assert summary(parts) == summary([text])
