"""Checks at submission that a regular expression can be enforced, and that its size is bounded."""

import re
from typing import Final

from app.errors import BadRequest

MAX_CHARACTERS: Final = 8_192
MAX_REPEAT: Final = 10_000

# Constructs that a finite automaton cannot match. A backslash and its character come first, so that
# an escaped bracket is not taken for a group.
TOKENS: Final = re.compile(
    r"\\(?P<escape>.)|(?P<group>\(\?(?:<[=!]|[=!>(]|P=|P>|R|&)?)|\{(?P<low>\d*)(?:,(?P<high>\d*))?\}",
    re.DOTALL,
)
LOOK_AROUNDS: Final = {"(?=", "(?!", "(?<=", "(?<!"}


def check_regex(pattern: str, *, param: str) -> None:
    """Raises BadRequest if a pattern is too large or needs more than a finite automaton.

    The serve worker finds other errors when it compiles the pattern.
    """
    if len(pattern) > MAX_CHARACTERS:
        raise _error(
            f"the regex has more than {MAX_CHARACTERS:,} characters; use a shorter one", param
        )
    for token in TOKENS.finditer(pattern):
        group, escape = token["group"], token["escape"]
        if group in LOOK_AROUNDS:
            raise _error(f"look-around '{group}' is not supported in a regex; leave it out", param)
        if group is not None and group != "(?":
            raise _error(f"'{group}' is not supported in a regex; leave it out", param)
        if escape is not None and (escape in "bBGKkXZ" or escape in "123456789"):
            raise _error(f"'\\{escape}' is not supported in a regex; leave it out", param)
        if max(_number(token["low"]), _number(token["high"])) > MAX_REPEAT:
            raise _error(
                f"a regex may repeat a part at most {MAX_REPEAT:,} times; use a smaller number",
                param,
            )


def _number(digits: str | None) -> int:
    return int(digits[:9]) if digits else 0


def _error(message: str, param: str) -> BadRequest:
    return BadRequest(message, "invalid_regex", param)
