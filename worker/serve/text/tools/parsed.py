"""Result of parsing a part of an answer."""

from typing import NamedTuple

from app.contracts.generation import ToolCallDelta


class Parsed(NamedTuple):
    """New text of an answer, without its tool calls, and the new parts of its tool calls."""

    text: str = ""
    calls: tuple[ToolCallDelta, ...] = ()

    def then(self, other: "Parsed") -> "Parsed":
        return Parsed(self.text + other.text, self.calls + other.calls)
