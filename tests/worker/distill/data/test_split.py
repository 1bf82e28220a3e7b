import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from worker.distill.data.rows import Row, split_rows
from worker.distill.data.split import (
    count_sharing,
    groups_of,
    hold_out,
    judged_questions_of,
    keep_apart,
    questions_of,
)
from worker.errors import InvalidTrainingFile


def conversation(line: int, *contents: str, unlearned: Sequence[int] = ()) -> Row:
    roles = ("user", "assistant")
    turns = tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))
    return Row(line, turns, unlearned=frozenset(unlearned))


def random_conversations(seed: int, num_rows: int, num_words: int) -> list[Row]:
    """Conversations of few words, so that many begin alike; some wait for an answer, some have silent answers."""
    draw = random.Random(seed)
    rows = []
    for line in range(num_rows):
        contents = [f"w{draw.randrange(num_words)}" for _ in range(draw.randint(1, 6))]
        answers = range(1, len(contents), 2)
        rows.append(
            conversation(line, *contents, unlearned=draw.sample(answers, k=len(answers) // 2))
        )
    return rows


def share_a_question(one: Row, other: Row) -> bool:
    """The slow, obvious way: compares the messages before every answer."""
    return any(
        one.messages[:i] == other.messages[:j]
        for i in questions_of(one)
        for j in questions_of(other)
    )


def test_a_conversation_is_held_out_together_with_its_continuation() -> None:
    rows = [conversation(2 * i, f"u{i}", f"a{i}") for i in range(20)]
    rows += [conversation(2 * i + 1, f"u{i}", f"a{i}", "And then?", "b") for i in range(20)]
    split = hold_out(rows)
    assert len(split.valid) == 4
    assert not any(share_a_question(one, other) for one in split.valid for other in split.train)
    assert split.warnings == ()


@pytest.mark.parametrize("num_words", [3, 12, 60])
@pytest.mark.parametrize("seed", range(4))
def test_no_question_is_learned_from_and_judged_on(seed: int, num_words: int) -> None:
    rows = random_conversations(seed, 120, num_words)
    split = hold_out(rows)
    learned = {question for row in split.train for question in questions_of(row).values()}
    judged = {question for row in split.valid for question in judged_questions_of(row)}
    assert not learned & judged
    assert sorted(row.line for row in (*split.train, *split.valid)) == list(range(120))
    assert 6 <= len(split.valid) <= 12


def test_conversations_that_all_begin_alike_are_judged_on_their_later_turns() -> None:
    rows = [conversation(i, "hello", "Hello.", f"u{i}", f"a{i}") for i in range(40)]
    rows.append(conversation(40, "hello", "Hello."))
    split = hold_out(rows)
    assert [row.unlearned for row in split.valid] == [{1}] * 4
    assert split.num_shared == 4
    assert "begin with the same questions" in split.warnings[0]
    assert all(row.unlearned == set() for row in split.train)
    assert rows[40] in split.train


def test_a_file_of_one_question_is_on_both_sides_and_says_so() -> None:
    rows = [conversation(i, "u", f"a{i}") for i in range(3)]
    split = hold_out(rows)
    assert (split.train, split.valid, split.num_shared) == (rows, rows, 3)
    assert "validation_file" in split.warnings[0]


def test_the_smallest_group_is_held_out_where_all_are_large() -> None:
    rows = [conversation(i, f"u{i % 3}", f"a{i}") for i in range(29)]
    split = hold_out(rows)
    assert {row.messages[0]["content"] for row in split.valid} == {"u2"}
    assert len(split.train) == 20


def test_the_split_does_not_depend_on_the_order_of_the_file() -> None:
    rows = random_conversations(9, 100, 30)
    shuffled = random.Random(1).sample(rows, k=len(rows))
    held_out = [{row.line for row in hold_out(order).valid} for order in (rows, shuffled)]
    assert held_out[0] == held_out[1]


def test_rows_of_one_turn_are_split_as_ever() -> None:
    rows = [conversation(i, f"u{i}", "a") for i in range(50)] + [
        Row(i, text=f"t{i}") for i in range(50)
    ]
    split = hold_out(rows)
    assert (split.train, split.valid) == split_rows(rows)


def test_a_job_that_began_with_the_first_split_keeps_it() -> None:
    rows = [conversation(i, f"u{i // 2}", "a", *(("u", "b") if i % 2 else ())) for i in range(40)]
    split = hold_out(rows, version=1)
    assert (split.train, split.valid) == split_rows(rows)
    assert hold_out(rows).train != split.train
    kept = keep_apart(rows, [conversation(0, "u1", "a", "u", "b")], version=1).train
    assert [row.line for row in kept] == [i for i in range(40) if i != 3]


def test_training_rows_lose_the_answers_to_what_a_validation_row_asks() -> None:
    valid = [conversation(0, "u", "a", "v", "b"), conversation(1, "x", "y")]
    train = [
        conversation(0, "u", "a"),
        conversation(1, "u", "a", "other", "c"),
        conversation(2, "u", "a", "v", "d"),
        conversation(3, "z", "a"),
    ]
    split = keep_apart(train, valid)
    assert split.train == [conversation(1, "u", "a", "other", "c", unlearned=[1]), train[3]]
    assert split.valid == valid
    assert (split.num_shared, split.num_left_out) == (1, 2)
    assert "1 validation rows share" in split.warnings[0]
    assert "2 training rows are left out" in split.warnings[0]


def test_training_rows_that_ask_nothing_of_their_own_are_refused() -> None:
    with pytest.raises(InvalidTrainingFile, match="use other questions"):
        keep_apart([conversation(0, "u", "a")], [conversation(0, "u", "b", "v", "c")])


def test_groups_are_the_components_of_shared_questions() -> None:
    rows = [
        replace(row, unlearned=frozenset())
        for row in random_conversations(5, 60, 12)
        if row.is_answered
    ]
    groups = list(range(len(rows)))
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            if share_a_question(one, other):
                low, high = sorted((groups[i], groups[j]))
                groups = [low if group == high else group for group in groups]
    expected = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    assert groups_of(rows) == [expected[group] for group in groups]
    assert len(expected) > 5


def test_rows_that_are_not_judged_on_their_common_turns_are_groups_of_their_own() -> None:
    rows = [conversation(i, "hello", "Hello.", f"u{i}", f"a{i}", unlearned=[1]) for i in range(3)]
    assert groups_of(rows) == [0, 1, 2]


def test_rows_that_share_a_question_are_counted() -> None:
    rows = [conversation(0, "u", "a", "v", "b"), conversation(1, "x", "y"), Row(2, text="u")]
    assert count_sharing(rows, [conversation(0, "u"), Row(1, text="t")]) == 1
