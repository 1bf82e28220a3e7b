"""Drafts of rows: stored completions as conversations that may become rows of a data set.

A draft keeps only hashes and the place of its record, so that many records fit into memory.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from app.contracts.datasets import DatasetOptions
from worker.dataset.near_duplicates import normalised
from worker.dataset.personal_data import Masker

Json = dict[str, Any]  # Any: JSON of clients
Message = dict[str, Any]  # Any: role and content as texts, and perhaps a weight
ROLES: Final = frozenset({"system", "developer", "user", "assistant"})
INSTRUCTIONS: Final = frozenset({"system", "developer"})  # roles
ID_BYTES: Final = 16


class Unsuitable(Exception):
    """The answer cannot become a row. The only argument is the reason, as the report counts it."""


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
    messages = conversation(record, choice)
    if len(messages[-1]["content"].strip()) < options.min_answer_characters:
        raise Unsuitable("short_answer")
    digest = hashlib.sha256()
    beginnings = []
    for index, message in enumerate(messages):
        content = " ".join(message["content"].split())
        digest.update(orjson.dumps([message["role"], content]))
        if message["role"] == "assistant":
            beginnings.append((index, digest.digest()[:ID_BYTES]))
    first = next(message for message in messages if message["role"] == "user")
    return Draft(
        place,
        choice,
        record["model"],
        record["created_at"],
        record["prompt_tokens"],
        record["completion_tokens"],
        beginnings[-1][1],
        tuple(beginnings[:-1]),
        normalised(first["content"]),
    )


def conversation(record: Json, choice: int) -> list[Message]:
    """Returns the messages of a record and one of its answers. Raises Unsuitable."""
    if record["request"].get("tools"):
        raise Unsuitable("tools")
    answer = record["completion"]["choices"][choice]["message"]
    messages = [_message(message) for message in [*record["messages"], answer]]
    if not any(message["role"] == "user" for message in messages):
        raise Unsuitable("no_user_message")
    return messages


def masked(messages: list[Message], masker: Masker) -> list[Message]:
    """Returns the messages of one conversation with their contents masked."""
    return [{**message, "content": masker.mask(message["content"])} for message in messages]


def comparable_text(messages: list[Message]) -> str:
    """Returns the text by which conversations are compared: all but the instructions.

    Many conversations share long instructions, which would make them all similar.
    """
    contents = [m["content"] for m in messages if m["role"] not in INSTRUCTIONS]
    return normalised("\n".join(contents))


def _message(message: Json) -> Message:
    content = message.get("content")
    if message["role"] not in ROLES or message.get("tool_calls"):
        raise Unsuitable("tools")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise Unsuitable("not_text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise Unsuitable("empty_message")
    return {"role": message["role"], "content": content}
