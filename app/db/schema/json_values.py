"""Converts values to JSON that Postgres can store.

JSONB supports neither NaN and infinities, nor the character NUL, nor surrogates.
"""

import math
from typing import Any

REPLACEMENT = "\ufffd"
UNSTORABLE = dict.fromkeys([0, *range(0xD800, 0xE000)], REPLACEMENT)


def clean_text(text: str) -> str:
    """Returns the text with U+FFFD in place of each NUL and each surrogate."""
    return text.translate(UNSTORABLE)


def clean(value: Any) -> Any:  # Any: a JSON value in, a JSON value out
    """Returns a copy of a JSON value that Postgres can store.

    NaN and infinities become None. Strings and keys are converted by `clean_text`.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value
