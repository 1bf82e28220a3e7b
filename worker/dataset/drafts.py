"""Drafts of rows: stored completions as conversations that may become rows of a data set.

A draft keeps only hashes and the place of its record, so that many records fit into memory.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from app.contracts.datasets import DatasetOptions
from worker.dataset.conversations import Conversation, Json, Unsuitable, identity
from worker.dataset.near_duplicates import normalised

ID_BYTES: Final = 16


@dataclass(frozen=True)
class Draft:
    """One answer of a stored completion.

    place: First byte of the record in the file.
    choice: Index of the answer among the record's choices.
    full: Hash of the conversation with the answer.
    beginnings: Hashes of the conversation up to each earlier answer, by index of the message.
    question: The first message of the user, normalised and not masked.
    """

    place: int
    choice: int
    model: str
    created_at: float
    prompt_tokens: int
    completion_tokens: int
    full: bytes
    beginnings: tuple[tuple[int, bytes], ...]
    question: str


class Records:
    """File of exported records, which are read one at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.num_bytes = path.stat().st_size

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[tuple[int, Json]]:
        """Yields each record with its place in the file."""
        place = 0
        self._file.seek(0)
        for line in self._file:
            yield place, orjson.loads(line)
            place += len(line)

    def at(self, place: int) -> Json:
        """Returns the record at this place."""
        self._file.seek(place)
        record: Json = orjson.loads(self._file.readline())
        return record


def draft_of(place: int, record: Json, choice: int, options: DatasetOptions) -> Draft:
    """Returns the draft of one answer of a record. Raises Unsuitable."""
    answer = record["completion"]["choices"][choice]
    if answer["finish_reason"] not in options.finish_reasons:
        raise Unsuitable("finish_reason")
    conversation = Conversation.of(record, choice)
    if len(conversation.answer.strip()) < options.min_answer_characters:
        raise Unsuitable("short_answer")
    digest = hashlib.sha256()
    if conversation.tools:
        digest.update(orjson.dumps(conversation.tools, option=orjson.OPT_SORT_KEYS))
    beginnings = []
    for index, message in enumerate(conversation.messages):
        digest.update(identity(message))
        if message["role"] == "assistant":
            beginnings.append((index, digest.digest()[:ID_BYTES]))
    return Draft(
        place,
        choice,
        record["model"],
        record["created_at"],
        record["prompt_tokens"],
        record["completion_tokens"],
        beginnings[-1][1],
        tuple(beginnings[:-1]),
        normalised(conversation.question),
    )
