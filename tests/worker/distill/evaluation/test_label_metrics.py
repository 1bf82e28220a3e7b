import pytest

from worker.distill.evaluation.label_metrics import find_labels, normalised, read_labels

MOODS = ["Good.", "bad", "good", "Bad!", "so so", "So  so"]


def test_few_short_targets_that_repeat_are_labels() -> None:
    labels = find_labels(MOODS, [2, 1, 1, 2, 2, 3])
    assert labels is not None
    assert labels.names == ("bad", "good", "so so")
    assert labels.max_tokens == 3


@pytest.mark.parametrize(
    ("references", "num_tokens"),
    [
        ([f"answer {i}" for i in range(8)], [2] * 8),  # none twice
        (["yes", "yes", "no"], [1] * 3),  # not twice on average
        ([f"class {i % 21}" for i in range(63)], [2] * 63),  # too many
        (["a long story", "another"] * 2, [9, 2] * 2),
        (["yes"] * 4, [1] * 4),  # nothing to tell apart
        ([], []),
    ],
)
def test_other_targets_are_not(references: list[str], num_tokens: list[int]) -> None:
    assert find_labels(references, num_tokens) is None


def test_many_and_long_targets_are_labels_if_they_are_said_to_be() -> None:
    assert read_labels([f"class {i % 21}" for i in range(63)], [12] * 63) is not None
    assert read_labels([f"answer {i}" for i in range(8)], [2] * 8) is None
    assert read_labels([], []) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" Yes.\n", "yes"),
        ("“no”", "“no”"),
        ("?", "?"),
        ("C++", "c++"),
        ("two\n words", "two words"),
        ("", ""),
    ],
)
def test_letters_case_and_what_surrounds_a_label_do_not_count(text: str, name: str) -> None:
    assert normalised(text) == name


def test_accuracy_and_macro_f1_of_answers() -> None:
    labels = find_labels(MOODS, [1] * 6)
    assert labels is not None
    accuracy, macro_f1 = labels.figures(
        ["good", "BAD", "bad", "I cannot say", "so so.", "good"], MOODS
    )
    assert accuracy.value == 0.5
    assert macro_f1.value == pytest.approx((0.5 + 0.5 + 2 / 3) / 3)


def test_a_teacher_that_gives_no_label_is_not_met_by_giving_none() -> None:
    labels = find_labels(MOODS, [1] * 6)
    assert labels is not None
    accuracy, macro_f1 = labels.figures(["hm"] * 6, ["hm"] * 6)
    assert (accuracy.value, macro_f1.value) == (0.0, 0.0)
    assert macro_f1.interval() == (0.0, 0.0)
