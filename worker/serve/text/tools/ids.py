"""Ids of tool calls."""

import secrets
import string

from worker.serve.text.tools.formats import ToolFormat

LETTERS = string.ascii_letters + string.digits
NUM_LETTERS = 24


def new_call_id(tool_format: ToolFormat) -> str:
    """Returns a random id, in the form that the chat templates of the format accept."""
    num_letters = tool_format.id_length
    letters = "".join(secrets.choice(LETTERS) for _ in range(num_letters or NUM_LETTERS))
    return letters if num_letters else f"call_{letters}"
