"""Answers of a model: printed while they are generated, alone or in a conversation."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.commands.remote.generation import CHATS
from app.commands.remote.output import printable
from app.commands.remote_service import RemoteError
from app.commands.shell import Json, messages, note

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService


@dataclass
class Answer:
    """Text that has arrived so far, why it ended, and the number of its tokens."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0


def print_answer(service: "RemoteService", path: str, body: Json) -> Answer:
    """Prints an answer while it arrives, and returns it. Raises RemoteError.

    On a terminal, the number of tokens and the speed follow on standard error.
    """
    answer, began = Answer(), time.monotonic()
    try:
        for piece in pieces(service, path, body, answer):
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    finally:
        if answer.text and not answer.text.endswith("\n"):
            print(flush=True)
    if messages.is_terminal:
        seconds = time.monotonic() - began
        speed = f"{answer.num_tokens} tokens in {seconds:.1f} s"
        cut = "; cut off by the limit of tokens" if answer.finish_reason == "length" else ""
        messages.print(f"{speed}{cut}", style="dim", highlight=False)
    return answer


def pieces(service: "RemoteService", path: str, body: Json, answer: Answer) -> Iterator[str]:
    """Yields the pieces of a streamed answer, and adds them to `answer`. Raises RemoteError."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    for chunk in service.stream("POST", path, body=body):
        answer.num_tokens = (chunk.get("usage") or {}).get("completion_tokens", answer.num_tokens)
        for choice in chunk["choices"]:
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            if text:
                answer.text += text
                yield text


def converse(service: "RemoteService", body: Json, first: list[Json]) -> None:
    """Reads messages from the terminal and prints the answers, until the end of the input."""
    import readline  # noqa: F401  # the arrow keys recall and edit earlier messages

    note("Ctrl-C stops an answer, /clear forgets the messages, Ctrl-D ends the conversation.")
    history = list(first)
    while (message := _read_message()) is not None:
        if message == "/clear":
            history = list(first)
            note("The messages are forgotten.")
            continue
        if not message:
            continue
        asked = [*history, {"role": "user", "content": message}]
        try:
            answer = print_answer(service, CHATS, {**body, "messages": asked})
        except KeyboardInterrupt:
            note("Stopped; the message and its answer are forgotten.")
            continue
        except RemoteError as error:
            note(f"stillhouse: {error}")
            continue
        history = [*asked, {"role": "assistant", "content": answer.text}]


def _read_message() -> str | None:
    """Returns the next message, or None at the end of the input. Ctrl-C clears the line."""
    while True:
        try:
            return input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None
