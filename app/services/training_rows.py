"""Parses and checks the rows of a JSONL file of training data, also while it is uploaded."""

import json

from app.errors import BadRequest
from app.services.fine_tuning.chat_rows import (
    InvalidRow,
    Row,
    RowDetails,
    check_chat,
    check_encodable,
    used,
)

BOM = b"\xef\xbb\xbf"
# The formats without completions, which the teacher writes, each with the same format with them.
ANSWERED_FORM = {"prompt": "prompt_completion", "input": "input_target", "chat_prompt": "chat"}
UNANSWERED = frozenset(ANSWERED_FORM)
# formats with messages
CONVERSATIONS = frozenset({"chat", "chat_prompt"})
FORMATS = {
    "chat": frozenset({"messages"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "prompt": frozenset({"prompt"}),
    "input_target": frozenset({"input", "target"}),
    "input": frozenset({"input"}),
    "text": frozenset({"text"}),
}
KNOWN_FORMATS = '{"messages": […]}, {"prompt", "completion"}, {"prompt"}, {"input", "target"}, {"input"} or {"text"}'
# The key that each format has, and the key of its answer.
KEYS = (("messages", None), ("prompt", "completion"), ("input", "target"), ("text", None))


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
        self.details = RowDetails()
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
            row = parse_row(line, is_first=self.num_rows == 0)
            row_format = check_row(row, self.details)
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


def check_row(row: Row, details: RowDetails) -> str:
    """Returns the format of a row, and counts the keys that are not read. Raises InvalidRow."""
    if row.keys() & {"preferred_output", "non_preferred_output"}:
        raise InvalidRow(
            'a preference row of DPO, which is not supported; use rows of the form {"messages": […]} with the '
            "preferred answers"
        )
    present = [(key, answer) for key, answer in KEYS if key in row]
    if len(present) != 1:
        shown = ", ".join(repr(key)[:40] for key in list(row)[:8]) or "none"
        raise InvalidRow(f"of no known format: its keys are {shown}; expected {KNOWN_FORMATS}")
    ((key, answer),) = present
    if key == "messages":
        return check_chat(row, details)
    row_format = key if answer is None or answer not in row else f"{key}_{answer}"
    details.ignore(used(row).keys() - FORMATS[row_format])
    for name in sorted(FORMATS[row_format]):
        _check_text(row[name], name)
    return row_format


def _check_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise InvalidRow(f"invalid: {name} must be a string")
    if not value.strip():
        raise InvalidRow(f"invalid: {name} is empty")
    check_encodable(value, name)


def _distinct(pairs: list[tuple[str, object]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise InvalidRow("invalid: a key appears twice in one object")
    return row


def _no_constant(name: str) -> object:
    raise InvalidRow(f"not valid JSON: {name} is not a JSON value")
