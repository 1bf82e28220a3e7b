"""Incremental scanner that finds the end of a bracketed text."""

import string

OPENING, CLOSING = "([{", ")]}"
# Outside strings, JSON has only these characters. Any other one shows that the text is broken.
JSON_CHARACTERS = frozenset(string.ascii_letters + string.digits + ' \t\r\n+-.:,[]{}"')


class SpanScanner:
    """Finds the bracket that closes the first one, in text that arrives in parts.

    Each character is read once. `is_python`: strings may have single quotes too.
    """

    def __init__(self, *, is_python: bool) -> None:
        self._quotes = "\"'" if is_python else '"'
        self._allowed = None if is_python else JSON_CHARACTERS
        self._expected: list[str] = []  # closing brackets, innermost last
        self._quote = ""
        self._is_escaped = False
        self._num_read = 0

    @property
    def num_read(self) -> int:
        """Number of characters that have been read."""
        return self._num_read

    def scan(self, text: str) -> bool | None:
        """Reads on in `text`, which begins with all text of earlier calls.

        Returns True if the span is complete at `num_read`, False if it is broken there, and None if
        more text is needed.
        """
        for at in range(self._num_read, len(text)):
            letter = text[at]
            if self._quote:
                if self._is_escaped:
                    self._is_escaped = False
                elif letter == "\\":
                    self._is_escaped = True
                elif letter == self._quote:
                    self._quote = ""
            elif letter in self._quotes:
                self._quote = letter
            elif letter in OPENING:
                self._expected.append(CLOSING[OPENING.index(letter)])
            elif letter in CLOSING:
                if self._expected.pop() != letter:
                    self._num_read = at
                    return False
                if not self._expected:
                    self._num_read = at + 1
                    return True
            elif self._allowed is not None and letter not in self._allowed:
                self._num_read = at
                return False
        self._num_read = len(text)
        return None
