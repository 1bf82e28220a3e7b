import json
from typing import Any

import pytest

from app.services.training_rows import RowChecker

Json = dict[str, Any]  # Any: rows of a file
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": ""}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def check(*rows: Json) -> RowChecker:
    checker = RowChecker(100_000, 1000)
    checker.feed("".join(json.dumps(row) + "\n" for row in rows).encode())
    checker.close()
    return checker


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        ({"messages": [USER, CALLING, RESULT, ANSWER], "tools": [TOOL]}, "chat"),
        ({"messages": [USER, CALLING], "tools": [TOOL], "parallel_tool_calls": True}, "chat"),
        ({"messages": [USER, CALLING, RESULT], "tools": [TOOL]}, "chat_prompt"),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "function_call": CALL["function"]},
                    {"role": "function", "name": "f", "content": "1"},
                    ANSWER,
                ],
                "functions": [TOOL["function"]],
            },
            "chat",
        ),
        ({"messages": [{"role": "developer", "content": "x"}, USER, ANSWER]}, "chat"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]}, "chat"),
        ({"messages": [USER, ANSWER, USER, {**ANSWER, "weight": 0}]}, "chat"),
        ({"messages": [USER, {**ANSWER, "tool_calls": None, "weight": None, "name": None}]}, "chat"),
    ],
)  # fmt: skip
def test_rows_of_openai_are_accepted(row: Json, row_format: str) -> None:
    checker = check(row)
    assert (checker.fault, checker.format) == (None, row_format)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1] has no content"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "content is empty"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "only an assistant message can"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
            "tool_calls[0].function.arguments must be a string with a JSON object",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "arguments must be a string",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": ["f"]}]}, "tool_calls[0] must be"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "tools[0].function must be"),
        ({"messages": [USER, ANSWER], "tools": {}}, "tools must be a list"),
        ({"messages": [USER, ANSWER], "tools": [TOOL], "functions": [TOOL["function"]]}, "tools and functions"),
        ({"messages": [USER, ANSWER], "parallel_tool_calls": 1}, "must be true or false"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            "only text is supported",
        ),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "all answers have weight 0"),
        ({"input": {"messages": []}, "preferred_output": []}, "preference row of DPO"),
        ({"prompt": "a", "text": "b"}, "of no known format"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learned_from_are_refused(row: Json, words: str) -> None:
    assert words in (check(row).fault or "")


def test_keys_that_are_not_read_are_counted() -> None:
    row = {"messages": [USER, {**ANSWER, "refusal": None, "id": 1}], "topic": "x"}
    plain = {"prompt": "a", "completion": "b", "to\npic": "x"}
    assert check(row, row).details.as_json() == {
        "ignored_keys": {"topic": 2, "messages[].id": 2},
    }
    assert check(plain).details.as_json() == {"ignored_keys": {"'to\\npic'": 1}}
    assert check({"messages": [USER, ANSWER]}).details.as_json() is None


def test_only_so_many_ignored_keys_are_counted_by_name() -> None:
    row = {"prompt": "a", **{f"key{n}": 1 for n in range(60)}}
    counts = check(row).details.ignored_keys
    assert len(counts) == 51
    assert counts["other keys"] == 10


def test_rows_with_tools_and_with_calls_are_counted() -> None:
    rows = [{"messages": [USER, ANSWER], "tools": [TOOL]}, {"messages": [USER, CALLING], "tools": [TOOL]}]  # fmt: skip
    counts = check(*rows).details.as_json()
    assert counts == {"num_rows_with_tools": 2, "num_rows_with_tool_calls": 1}
