"""Keeps training rows and held-out rows apart, so that no question is both learned from and judged on.

A question is the list of messages before an answer. A conversation asks one question per answered turn, so two
conversations that begin alike share the questions of their common turns. A plain text is a question of its own.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, replace

from app.contracts.messages import SPLIT_VERSION
from worker.distill.data.rows import MAX_VALIDATION_ROWS, Row, split_rows, without_questions_of
from worker.errors import InvalidTrainingFile


@dataclass(frozen=True)
class Split:
    """Training and held-out rows, each in the order of its file.

    `num_shared` counts the held-out rows that share a question with the training file. `num_left_out` counts the
    training rows that are left out for that reason. `warnings` tell the user what was done about it.
    """

    train: list[Row]
    valid: list[Row]
    num_shared: int = 0
    num_left_out: int = 0
    warnings: tuple[str, ...] = ()


def questions_of(row: Row) -> dict[int, str]:
    """Returns the hash of each question, by the place of its answer in the messages; a plain text has the place 0."""
    if row.text is not None:
        return {0: _sha256(row.text)}
    places = [i for i, turn in enumerate(row.messages) if turn["role"] == "assistant" and i > 0]
    if not row.is_answered:
        places.append(len(row.messages))
    return {place: _sha256(json.dumps(row.messages[:place], sort_keys=True)) for place in places}


def judged_questions_of(row: Row) -> list[str]:
    """Returns the questions that a held-out row is judged on: those of answers with a weight, or of the one to come."""
    asked = questions_of(row)
    if not row.is_answered:
        return [asked[max(asked)]]
    return [question for place, question in asked.items() if place not in row.unlearned]


def groups_of(rows: Sequence[Row]) -> list[int]:
    """Returns a group number per row: rows that are connected by questions they are judged on have the same one.

    Groups are numbered in the order of their first rows.
    """
    return _connected([judged_questions_of(row) for row in rows])


def count_sharing(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """Returns how many of the rows share a question with one of the others."""
    questions = {question for row in others for question in questions_of(row).values()}
    return sum(not questions.isdisjoint(questions_of(row).values()) for row in rows)


def hold_out(rows: Sequence[Row], version: int = SPLIT_VERSION) -> Split:
    """Splits a file: about a tenth of the rows, at most 200, are held out. Version 1 compares last questions only.

    Rows that share a question fall on the same side. The split depends on the set of rows alone, not on their order
    nor on a seed. If so many conversations begin alike that too few rows can be held out, their common first turns
    stay with the training rows, and held-out rows are not judged on the answers to them. A file of one question has
    the same rows on both sides.
    """
    if version == 1:
        train, valid = split_rows(rows)
        return Split(train, valid)
    questions = [questions_of(row) for row in rows]
    held_out = _choose(rows, questions)
    if not held_out:
        message = (
            "every row asks the same question, so the held-out rows are the training rows and the figures say nothing "
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
            f"most conversations begin alike: {num_shared} held-out rows share their first questions with training rows "
            "and are not judged on the answers to those"
        )
    return Split(train, valid, num_shared, warnings=tuple(warnings))


def keep_apart(rows: Sequence[Row], valid: Sequence[Row], version: int = SPLIT_VERSION) -> Split:
    """Keeps all validation rows, and takes the answers to their questions out of the training rows.

    A training row whose last question a validation row asks, or that has no other answer to learn from, is left out.

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
            "every training row asks what a validation row asks; keep them apart"
        )
    warnings = []
    if num_left_out or num_cut:
        warnings.append(
            f"{num_shared} validation rows share a question with training rows: {num_left_out} training rows are left out, "
            f"and {num_cut} are not learned from at the turns they share"
        )
    return Split(kept, list(valid), num_shared, num_left_out, tuple(warnings))


def without_answers(row: Row, questions: Set[str]) -> Row | None:
    """Returns the row with weight 0 for its answers to these questions.

    Returns None if the row's last question is among them, or if no other answer has a weight.
    """
    asked = questions_of(row)
    if not _has_another(row, asked, questions):
        return None
    shared = {place for place, question in asked.items() if question in questions}
    return replace(row, unlearned=row.unlearned | shared) if shared else row


def _has_another(row: Row, asked: dict[int, str], questions: Set[str]) -> bool:
    """Whether the row's last question, and that of an answer with a weight, are not among these questions."""
    last = max(asked)
    weighted = (
        [place for place in asked if place not in row.unlearned] if row.is_answered else [last]
    )
    return asked[last] not in questions and any(asked[place] not in questions for place in weighted)


def _choose(rows: Sequence[Row], questions: Sequence[dict[int, str]]) -> set[int]:
    """Returns the numbers of the rows to hold out, or none if all rows ask the same."""
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
    smallest = min(groups, key=len)  # of more rows than wanted
    return set(smallest)


def _limits(largest: int) -> Iterator[int]:
    """Yields how many rows a question may connect: any number at first, then half as many each time."""
    while largest:
        yield largest
        largest //= 2


def _groups(
    rows: Sequence[Row], questions: Sequence[dict[int, str]], common: Set[str]
) -> list[list[int]]:
    """Returns the groups of rows that can be held out, sorted by hash; only the common questions are shared by groups.

    A group is left out if one of its rows could not be judged without the common questions.
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
    """Returns the number of the connected component per item, by union-find over shared names."""
    parents = list(range(len(items)))

    def root(i: int) -> int:
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
