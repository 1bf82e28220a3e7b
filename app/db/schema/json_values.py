"""JSON that Postgres takes: JSONB knows no NaN, no NUL and no half of a surrogate pair."""

import math
from typing import Any

REPLACEMENT = "\ufffd"
UNSTORABLE = dict.fromkeys([0, *range(0xD800, 0xE000)], REPLACEMENT)


def clean_text(text: str) -> str:
    return text.translate(UNSTORABLE)


def clean(value: Any) -> Any:  # Any: a JSON value in, a JSON value out
    """The same value, with null for numbers that JSON lacks and a replacement for characters it cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value
