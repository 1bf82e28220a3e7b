import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.services.training_rows import RowChecker

ROWS = [{"prompt": "What is 蒸馏?", "completion": "naïve"}, {"prompt": "b", "completion": "c\n"}]
CONTENT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def outcome(content: bytes, cuts: list[int], max_line_bytes: int = 200) -> tuple[object, ...]:
    checker = RowChecker(max_line_bytes, max_rows=1000)
    places = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts)})
    for start, end in pairwise(places):
        checker.feed(content[start:end])
    checker.close()
    return checker.num_rows, checker.max_row_bytes, checker.format, checker.fault


@given(st.lists(st.integers(0, 10_000), max_size=20))
def test_pieces_of_any_size_are_judged_like_the_whole(cuts: list[int]) -> None:
    assert outcome(CONTENT, cuts) == outcome(CONTENT, [])
    assert outcome(CONTENT, [])[0] == 2


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_any_bytes_get_a_verdict_and_the_same_one_in_pieces(
    content: bytes, cuts: list[int]
) -> None:
    whole = outcome(content, [])
    assert outcome(content, cuts) == whole
    assert whole[0] == 0 or whole[2] is not None
    assert whole[3] is not None or whole[0] != 0


def test_a_line_without_end_is_cut_off_before_it_fills_the_memory() -> None:
    checker = RowChecker(1000, max_rows=1000)
    for _ in range(100):
        checker.feed(b"x" * 100)
    assert checker.fault == "line 1 is longer than 1,000 bytes"
    assert len(checker._rest) <= 1100


def test_a_last_line_may_lack_its_newline() -> None:
    assert outcome(CONTENT, []) == outcome(CONTENT + b"\n", [])


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ({"weight": 1, "name": "still"}, None),
        ({"weight": 0}, "all answers have weight 0"),
        ({"weight": 0.5}, "messages[1] has a weight"),
        ({"name": 1}, "messages[1].name must be a string"),
        ({"tool_calls": []}, None),
    ],
)
def test_an_answer_may_have_a_weight_and_a_name(
    extra: dict[str, object], fault: str | None
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | extra]
    checker = RowChecker(1000, 10)
    checker.feed(json.dumps({"messages": messages}).encode() + b"\n")
    assert (checker.fault is None) if fault is None else (fault in (checker.fault or ""))


def test_conversations_are_told_apart_by_who_speaks_last() -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for messages, row_format in (
        ([user, assistant], "chat"),
        ([user, assistant, user], "chat_prompt"),
    ):
        assert outcome(json.dumps({"messages": messages}).encode(), [])[2] == row_format
