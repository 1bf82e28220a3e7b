"""Random ids of rows."""

import secrets


def new_id(prefix: str) -> str:
    """Returns the prefix, which names the type of the row, followed by 96 random bits in hex."""
    return f"{prefix}{secrets.token_hex(12)}"
