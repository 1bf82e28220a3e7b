"""A question keeps its side, and similar questions are never on two sides."""

from collections import Counter

from worker.dataset.sides import Groups, kept_sides, side_of


def test_the_side_of_a_question_depends_on_nothing_but_its_text() -> None:
    questions = [f"question {number}" for number in range(4000)]
    sides = {question: side_of(question, 0.1, 0.2) for question in questions}
    counts = Counter(sides.values())
    assert 0.07 < counts["validation"] / 4000 < 0.13
    assert 0.17 < counts["test"] / 4000 < 0.23
    assert {side_of(question, 0.0, 0.0) for question in questions} == {"training"}
    larger = {question for question in questions if side_of(question, 0.1, 0.3) == "test"}
    assert {question for question, side in sides.items() if side == "test"} < larger


def test_groups_are_transitive() -> None:
    groups = Groups()
    for _ in range(6):
        groups.add()
    groups.join(4, 2)
    groups.join(5, 4)
    groups.join(0, 1)
    assert [groups.group_of(number) for number in range(6)] == [0, 0, 2, 3, 2, 2]


def test_of_a_group_on_two_sides_only_the_larger_side_is_kept() -> None:
    sides = kept_sides(
        [0, 0, 0, 1, 1, 2], ["training", "training", "test", "validation", "training", "test"]
    )
    assert sides == ["training", "training", None, "validation", None, "test"]
