"""Incremental reader of answers that a grammar restricts to tool calls.

The text follows the layout of the grammar, so arguments can be sent while they are written.
"""

from collections.abc import Collection

from app.contracts.generation import ToolCallDelta
from worker.serve.text.tools.formats import ToolFormat
from worker.serve.text.tools.ids import new_call_id
from worker.serve.text.tools.parsed import Parsed
from worker.serve.text.tools.spans import SpanScanner


class CallReader:
    """Reader of one answer that should consist of calls.

    The parts of a call are its name, and then its arguments in pieces. If the text does not follow
    the layout, `has_deviated` becomes true, and the rest of the text is in `held`.
    """

    def __init__(
        self, tool_format: ToolFormat, names: Collection[str], *, is_parallel: bool
    ) -> None:
        layout = tool_format.layout
        assert layout is not None
        self._format = tool_format
        self._is_parallel = is_parallel
        before, _, self._closing = layout.call.partition("ARGUMENTS")
        headers = {before.replace("NAME", name): name for name in names}
        lead = (tool_format.begins[0] if layout.has_mark else "") + layout.before
        self._first = {lead + header: name for header, name in headers.items()}
        self._later: dict[str, str] = {}
        if layout.between_calls is not None:
            link = self._closing + layout.between_calls
            self._later |= {link + header: name for header, name in headers.items()}
        if layout.between_blocks is not None:
            link = self._closing + layout.after + layout.between_blocks + lead
            self._later |= {link + header: name for header, name in headers.items()}
        self._last = self._closing + layout.after
        self._scanner: SpanScanner | None = None
        self._num_sent = 0
        self.held = ""
        self.num_calls = 0
        self.has_deviated = False

    @property
    def is_over(self) -> bool:
        """True if the answer has all calls that the request allows."""
        return self.num_calls > 0 and self._scanner is None and not self._is_parallel

    def feed(self, text: str) -> Parsed:
        """Adds text and returns the new parts of calls."""
        self.held += text
        parts: list[ToolCallDelta] = []
        while not (self.is_over or self.has_deviated):
            part = self._next_header() if self._scanner is None else self._next_arguments()
            if part is None:
                break
            parts.append(part)
        return Parsed(calls=tuple(parts))

    def _next_header(self) -> ToolCallDelta | None:
        """Returns the name of the next call, or None if its text is incomplete."""
        headers = self._later if self.num_calls else self._first
        for header, name in headers.items():
            if self.held.startswith(header):
                self.held = self.held[len(header) :]
                self._scanner, self._num_sent = SpanScanner(is_python=False), 0
                self.num_calls += 1
                return ToolCallDelta(
                    index=self.num_calls - 1, id=new_call_id(self._format), name=name
                )
        expected = [*headers, self._last] if self.num_calls else [*headers]
        self.has_deviated = not any(text.startswith(self.held) for text in expected)
        return None

    def _next_arguments(self) -> ToolCallDelta | None:
        """Returns the next piece of the arguments, or None if there is none yet."""
        assert self._scanner is not None
        if self.held[:1] not in ("", "{"):
            self.has_deviated = True
            return None
        is_complete = self._scanner.scan(self.held)
        piece = self.held[self._num_sent : self._scanner.num_read]
        self._num_sent = self._scanner.num_read
        if is_complete is not None:
            self.held = self.held[self._num_sent :]
            self._scanner = None
            self.has_deviated = not is_complete
        return ToolCallDelta(index=self.num_calls - 1, arguments=piece) if piece else None
