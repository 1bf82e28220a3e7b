"""Splits rows into training and held-out rows that share no questions.

A question is the list of messages before an answer. A conversation has one question per answered
turn, so two conversations with the same first turns share the questions of those turns. A plain
text is a question of its own.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, replace

from app.contracts.messages import SPLIT_VERSION
from app.contracts.run_limits import MAX_VALIDATION_ROWS
from worker.distill.data.rows import (
    Row,
    asked_text,
    split_rows,
    without_questions_of,
)
from worker.errors import InvalidTrainingFile


@dataclass(frozen=True)
class Split:
    """Training and held-out rows, each in the order of its file.

    `num_shared` counts the held-out rows that share a question with the training file.
    `num_left_out` counts the training rows that are left out for that reason. `warnings` are
    messages to the user about both.
    """

    train: list[Row]
    valid: list[Row]
    num_shared: int = 0
    num_left_out: int = 0
    warnings: tuple[str, ...] = ()


def questions_of(row: Row) -> dict[int, str]:
    """Returns the hashes of a row's questions, by the index of the answer in `row.messages`.

    A plain text has the single index 0.
    """
    if row.text is not None:
        return {0: _sha256(row.text)}
    places = [i for i, turn in enumerate(row.messages) if turn["role"] == "assistant" and i > 0]
    if not row.is_answered:
        places.append(len(row.messages))
    return {place: _sha256(asked_text(row, place)) for place in places}


def judged_questions_of(row: Row) -> list[str]:
    """Returns the hashes of the questions whose answers count when a held-out row is evaluated.

    These are the questions of the answers with a weight other than 0. For an unanswered row it is
    the question that is still to be answered.
    """
    asked = questions_of(row)
    if not row.is_answered:
        return [asked[max(asked)]]
    return [question for place, question in asked.items() if place not in row.unlearned]


def groups_of(rows: Sequence[Row]) -> list[int]:
    """Returns a group number per row. Rows that share an evaluated question are in the same group.

    The relation is transitive. Groups are numbered in the order of their first rows.
    """
    return _connected([judged_questions_of(row) for row in rows])


def count_sharing(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """Returns the number of rows that share a question with at least one of `others`."""
    questions = {question for row in others for question in questions_of(row).values()}
    return sum(not questions.isdisjoint(questions_of(row).values()) for row in rows)


def hold_out(rows: Sequence[Row], version: int = SPLIT_VERSION) -> Split:
    """Splits the rows of a file. A tenth of them, usually at most MAX_VALIDATION_ROWS, is held out.

    Rows that share a question are on the same side. The split depends only on the set of rows, not
    on their order or on a seed.

    Too few rows can be held out if most conversations have the same first turns. Held-out rows may
    then share these turns with training rows, and their answers there do not count. If that is not
    possible either, because all rows ask the same question, both sides have all rows.

    Version 1 compares only the last question of each row.
    """
    if version == 1:
        train, valid = split_rows(rows)
        return Split(train, valid)
    questions = [questions_of(row) for row in rows]
    held_out = _choose(rows, questions)
    if not held_out:
        message = (
            "all rows have the same question, so the held-out rows are the training rows and the metrics say nothing "
            "about other questions; give a validation_file"
        )
        return Split(list(rows), list(rows), num_shared=len(rows), warnings=(message,))
    learned = {q for i, asked in enumerate(questions) if i not in held_out for q in asked.values()}
    train, valid, num_shared = [], [], 0
    for i, row in enumerate(rows):
        if i not in held_out:
            train.append(row)
            continue
        judged = without_answers(row, learned)
        assert judged is not None
        num_shared += judged != row
        valid.append(judged)
    warnings = []
    if num_shared:
        warnings.append(
            f"most conversations begin with the same questions: {num_shared} held-out rows share their first questions "
            "with training rows and are not evaluated on the answers to those"
        )
    return Split(train, valid, num_shared, warnings=tuple(warnings))


def keep_apart(rows: Sequence[Row], valid: Sequence[Row], version: int = SPLIT_VERSION) -> Split:
    """Keeps all validation rows, and sets the weight of shared questions to 0 in the training rows.

    A training row is left out if a validation row has its last question, or if none of its other
    answers has a weight. Version 1 compares only the last question of each row.

    Raises:
        InvalidTrainingFile: No training row remains.
    """
    if version == 1:
        kept = without_questions_of(rows, valid)
        num_shared = count_sharing(valid, rows) if len(kept) < len(rows) else 0
        num_cut = 0
    else:
        num_shared = count_sharing(valid, rows)
        judged = {question for row in valid for question in questions_of(row).values()}
        cut = [(row, without_answers(row, judged)) for row in rows]
        kept = [after for _, after in cut if after is not None]
        num_cut = sum(after is not None and after != row for row, after in cut)
    num_left_out = len(rows) - len(kept)
    if not kept:
        raise InvalidTrainingFile(
            "every training row has the same question as a validation row; use other questions for validation"
        )
    warnings = []
    if num_left_out or num_cut:
        warnings.append(
            f"{num_shared} validation rows share a question with training rows: {num_left_out} training rows are left out, "
            f"and the shared turns of {num_cut} others are not trained on"
        )
    return Split(kept, list(valid), num_shared, num_left_out, tuple(warnings))


def without_answers(row: Row, questions: Set[str]) -> Row | None:
    """Returns the row with weight 0 for its answers to these questions.

    Returns None if the row's last question is one of them, or if no other answer has a weight.
    """
    asked = questions_of(row)
    if not _has_another(row, asked, questions):
        return None
    shared = {place for place, question in asked.items() if question in questions}
    return replace(row, unlearned=row.unlearned | shared) if shared else row


def _has_another(row: Row, asked: dict[int, str], questions: Set[str]) -> bool:
    """Returns whether the row can be used without these questions.

    Its last question, and the question of at least one weighted answer, must not be among them.
    """
    last = max(asked)
    weighted = (
        [place for place in asked if place not in row.unlearned] if row.is_answered else [last]
    )
    return asked[last] not in questions and any(asked[place] not in questions for place in weighted)


def _choose(rows: Sequence[Row], questions: Sequence[dict[int, str]]) -> set[int]:
    """Returns the indices of the rows to hold out. The set is empty if they form a single group."""
    wanted = min(max(1, min(len(rows) // 10, MAX_VALIDATION_ROWS)), len(rows) - 1)
    counts = Counter(question for asked in questions for question in asked.values())
    for most in _limits(max(counts.values())):
        common = {question for question, count in counts.items() if count > most}
        chosen = _first_that_fit(_groups(rows, questions, common), wanted)
        if 2 * len(chosen) >= wanted:
            return chosen
    groups = _groups(rows, questions, frozenset())
    if len(groups) < 2:
        return set()
    smallest = min(groups, key=len)  # has more rows than wanted
    return set(smallest)


def _limits(largest: int) -> Iterator[int]:
    """Yields limits for the number of rows that one question may connect, halved each time."""
    while largest:
        yield largest
        largest //= 2


def _groups(
    rows: Sequence[Row], questions: Sequence[dict[int, str]], common: Set[str]
) -> list[list[int]]:
    """Returns the groups of rows that can be held out, sorted by their smallest question hash.

    Different groups share no questions except the common ones. A group is left out if one of its
    rows could not be evaluated without the common questions.
    """
    own = [
        [question for question in asked.values() if question not in common] for asked in questions
    ]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(_connected(own)):
        members.setdefault(group, []).append(i)
    eligible = {
        min(question for i in numbers for question in own[i]): numbers
        for numbers in members.values()
        if all(_has_another(rows[i], questions[i], common) for i in numbers)
    }
    return [eligible[name] for name in sorted(eligible)]


def _first_that_fit(groups: Sequence[list[int]], wanted: int) -> set[int]:
    chosen: set[int] = set()
    for numbers in groups:
        if len(chosen) + len(numbers) <= wanted:
            chosen.update(numbers)
    return chosen


def _connected(items: Sequence[Collection[str]]) -> list[int]:
    """Returns the number of each item's connected component, by union-find over shared names."""
    parents = list(range(len(items)))

    def root(i: int) -> int:
        """Returns the representative of the component of item i, and shortens the path to it."""
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    owners: dict[str, int] = {}
    for i, names in enumerate(items):
        for name in names:
            one, other = root(owners.setdefault(name, i)), root(i)
            parents[max(one, other)] = min(one, other)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(items))]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
