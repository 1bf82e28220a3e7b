"""Parses and checks the rows of a JSONL file of training data, also while it is uploaded."""

import json
from typing import Any

from app.errors import BadRequest

BOM = b"\xef\xbb\xbf"
# Formats without completions, which the teacher writes, and formats with messages.
UNANSWERED = frozenset({"prompt", "input", "chat_prompt"})
CONVERSATIONS = frozenset({"chat", "chat_prompt"})
# Optional keys of a message. The name is ignored; messages with weight 0 are not learned from.
OPTIONAL = frozenset({"name", "weight"})
ROLES = ("system", "developer", "user", "assistant", "tool")
FORMATS = {
    "chat": frozenset({"messages"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "prompt": frozenset({"prompt"}),
    "input_target": frozenset({"input", "target"}),
    "input": frozenset({"input"}),
    "text": frozenset({"text"}),
}
KNOWN_FORMATS = '{"messages": […]}, {"prompt", "completion"}, {"prompt"}, {"input", "target"}, {"input"} or {"text"}'
Row = dict[str, Any]  # Any: JSON values of a client


class InvalidRow(ValueError):
    """A row is invalid. The message continues the sentence "line N is"."""


class RowChecker:
    """Incremental checker of a file that arrives in pieces of any size.

    Records the first fault in `fault` and then ignores the rest. Holds at most one piece and one
    line in memory.
    """

    def __init__(self, max_line_bytes: int, max_rows: int) -> None:
        self.max_line_bytes = max_line_bytes
        self.max_rows = max_rows
        self.num_rows = 0
        self.max_row_bytes = 0
        self.format: str | None = None
        self.fault: str | None = None
        self._rest = bytearray()

    def feed(self, piece: bytes) -> None:
        if self.fault is not None:
            return
        *lines, rest = piece.split(b"\n")
        for line in lines:
            self._rest += line
            self._take(bytes(self._rest))
            self._rest.clear()
            if self.fault is not None:
                return
        self._rest += rest
        if len(self._rest) > self.max_line_bytes:
            self._take(bytes(self._rest))

    def close(self) -> None:
        """Checks the last line, which may lack a newline, and that the file is not empty."""
        if self._rest and self.fault is None:
            self._take(bytes(self._rest))
        if self.num_rows == 0 and self.fault is None:
            self.fault = "the file is empty; put one JSON object on each line"

    def raise_fault(self) -> None:
        if self.fault is not None:
            raise BadRequest(self.fault, "invalid_file", "file")

    def _take(self, line: bytes) -> None:
        try:
            if self.num_rows >= self.max_rows:
                raise InvalidRow(
                    f"over the limit: a file has at most {self.max_rows:,} rows; split it"
                )
            if len(line) > self.max_line_bytes:
                raise InvalidRow(f"longer than {self.max_line_bytes:,} bytes")
            row_format = check_row(parse_row(line, is_first=self.num_rows == 0))
            if self.format is not None and row_format != self.format:
                raise InvalidRow(
                    f"of format {row_format} in a file of format {self.format}; use one format per file"
                )
        except InvalidRow as fault:
            self.fault = f"line {self.num_rows + 1} is {fault}"
            return
        self.format = row_format
        self.num_rows += 1
        self.max_row_bytes = max(self.max_row_bytes, len(line))


def parse_row(line: bytes, *, is_first: bool = False) -> Row:
    """Returns the JSON object on a line. Raises InvalidRow."""
    if is_first and line.startswith(BOM):
        raise InvalidRow(
            "invalid: it begins with a byte order mark; save the file as UTF-8 without it"
        )
    if not line.strip():
        raise InvalidRow("empty; remove it")
    try:
        row = json.loads(
            line.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise InvalidRow(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise InvalidRow(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise InvalidRow("nested too deeply") from None
    except ValueError as error:  # also an integer with too many digits for `int`
        raise InvalidRow(
            str(error) if isinstance(error, InvalidRow) else "not valid JSON: a number is too long"
        ) from None
    if not isinstance(row, dict):
        raise InvalidRow(f"not a JSON object; expected {KNOWN_FORMATS}")
    return row


def check_row(row: Row) -> str:
    """Returns the format of a row. Raises InvalidRow."""
    keys = row.keys()
    row_format = next((name for name, wanted in FORMATS.items() if keys == wanted), None)
    if row_format is None:
        shown = ", ".join(repr(key)[:40] for key in list(keys)[:8]) or "none"
        raise InvalidRow(f"of no known format: its keys are {shown}; expected {KNOWN_FORMATS}")
    if row_format == "chat":
        return _check_messages(row["messages"])
    for key in sorted(FORMATS[row_format]):
        _check_text(row[key], key)
    return row_format


def _check_messages(messages: object) -> str:
    """Returns `chat` if the conversation ends with an answer, or else `chat_prompt`."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRow("invalid: messages must be a list with at least one message")
    roles = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.keys() - OPTIONAL != {"role", "content"}:
            raise InvalidRow(
                f"invalid: {where} must be an object with role and content; only weight and name are optional"
            )
        if message["role"] not in ROLES:
            raise InvalidRow(f"invalid: {where}.role must be one of {', '.join(ROLES)}")
        _check_text(message["content"], f"{where}.content")
        if message.get("weight", 1) not in (0, 1) or not isinstance(message.get("name", ""), str):
            raise InvalidRow(
                f"invalid: {where} has a weight that is not 0 or 1, or a name that is not a string"
            )
        roles.append(message["role"])
    if "user" not in roles[:-1] and roles[-1] != "user":
        raise InvalidRow("invalid: messages has no user message")
    if roles[-1] not in ("user", "assistant", "tool"):
        raise InvalidRow("invalid: the last message must have the role user, assistant or tool")
    if roles[-1] == "assistant" and not messages[-1].get("weight", 1):
        raise InvalidRow("invalid: the last answer has weight 0; leave it out, or give it weight 1")
    return "chat" if roles[-1] == "assistant" else "chat_prompt"


def _check_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise InvalidRow(f"invalid: {name} must be a string")
    if not value.strip():
        raise InvalidRow(f"invalid: {name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRow(
            f"invalid: {name} contains an unpaired surrogate, which is not a character"
        ) from None


def _distinct(pairs: list[tuple[str, object]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise InvalidRow("invalid: a key appears twice in one object")
    return row


def _no_constant(name: str) -> object:
    raise InvalidRow(f"not valid JSON: {name} is not a JSON value")
