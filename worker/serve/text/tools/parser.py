"""Incremental parser that separates the tool calls of an answer from its text."""

from collections.abc import Collection

from app.contracts.generation import ToolCallDelta
from worker.serve.text.tools.call_reader import CallReader
from worker.serve.text.tools.calls import Call, NotACall
from worker.serve.text.tools.formats import BROKEN, ToolFormat
from worker.serve.text.tools.ids import new_call_id
from worker.serve.text.tools.parsed import Parsed
from worker.serve.text.tools.spans import SpanScanner


class ToolParser:
    """Parser of one answer in one format.

    A call is returned when its text is complete. Text that may begin a call is held back until that
    is known. Text that begins like a call and is none is returned as text. Spaces around calls are
    dropped. The result does not depend on how the answer was divided.

    An answer that a grammar restricts to calls is read by a `CallReader`, which returns arguments in
    pieces. If such an answer is no call after all, it is parsed like any other.

    The brackets and strings of a call are scanned once, in however many parts the call arrives.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        names: Collection[str],
        *,
        is_parallel: bool,
        has_calls_only: bool = False,
    ) -> None:
        """Creates a parser. `names` are those of the tools; calls of other tools are text.

        With `has_calls_only`, a grammar restricts the answer to calls.
        """
        self._format = tool_format
        self._names = names
        self._is_parallel = is_parallel
        self._reader: CallReader | None = None
        if has_calls_only and tool_format.layout is not None:
            self._reader = CallReader(tool_format, names, is_parallel=is_parallel)
        self._text = ""  # not parsed yet
        self._out: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._num_calls = 0
        # At an edge: at the start of the answer or after a call. `_gap` holds the spaces there.
        self._is_edge, self._gap = True, ""
        self._begun: str | None = None  # the mark of the block whose call is being read
        self._can_repeat = False
        self._scanner: SpanScanner | None = None
        self._at_bracket = 0  # position of the first bracket in _text

    @property
    def num_calls(self) -> int:
        return self._num_calls

    @property
    def is_over(self) -> bool:
        """True if the answer has all calls that the request allows."""
        if self._reader is not None:
            return self._reader.is_over
        return self._num_calls > 0 and not self._is_parallel

    def feed(self, text: str) -> Parsed:
        """Adds text and returns what can no longer change."""
        if self._reader is not None:
            parsed = self._reader.feed(text)
            self._num_calls = self._reader.num_calls
            if not self._reader.has_deviated:
                return parsed
            if self._num_calls:  # the rest is text
                self._is_edge = False
            text, self._reader = self._reader.held, None
            return parsed.then(self.feed(text))
        self._text += text
        while not self.is_over and self._advance():
            pass
        return self._taken()

    def end(self) -> Parsed:
        """Returns what was held back, at the end of the answer."""
        if self._reader is not None:
            if self._num_calls:
                return Parsed()
            self._text, self._reader = self._reader.held, None
        if not self.is_over:
            held = (self._begun or "") + self._text
            if held or not self._num_calls:
                held = self._gap + held
            self._out.append(held)
        self._text, self._gap, self._begun = "", "", None
        return self._taken()

    def _taken(self) -> Parsed:
        parsed = Parsed("".join(self._out), tuple(self._calls))
        self._out, self._calls = [], []
        return parsed

    def _advance(self) -> bool:
        """Makes one step. Returns False if more text is needed for the next one."""
        if self._begun is not None:
            return self._read_call() if self._scanner is not None else self._find_bracket()
        return self._leave_edge() if self._is_edge else self._find_block()

    def _leave_edge(self) -> bool:
        """Skips spaces, and then begins a block or plain text."""
        spaces = " \t\r\n" + (self._format.separators if self._num_calls else "")
        rest = self._text.lstrip(spaces)
        self._gap += self._text[: len(self._text) - len(rest)]
        self._text = rest
        if not rest:
            return False
        ends = self._format.ends if self._num_calls else ()
        for mark in (*self._format.begins, *ends):
            if rest.startswith(mark):
                self._text = rest[len(mark) :]
                if mark in ends:
                    self._gap, self._can_repeat = "", False
                else:
                    self._begun = mark
                return True
        if any(mark.startswith(rest) for mark in (*self._format.begins, *ends)):
            return False
        if self._can_begin_unmarked(rest):
            self._begun = ""
            return True
        self._out.append(self._gap)
        self._is_edge, self._gap = False, ""
        return True

    def _can_begin_unmarked(self, rest: str) -> bool:
        if not self._num_calls:
            return rest[0] in self._format.starters
        return self._can_repeat and self._format.head(rest) != BROKEN

    def _find_block(self) -> bool:
        """Returns text up to the next mark that begins a block."""
        found = [(at, mark) for mark in self._format.begins if (at := self._text.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            self._out.append(self._text[:at])
            self._text, self._begun = self._text[at + len(mark) :], mark
            return True
        num_held = num_characters_held(self._text, self._format.begins)
        self._out.append(self._text[: len(self._text) - num_held])
        self._text = self._text[len(self._text) - num_held :]
        return False

    def _find_bracket(self) -> bool:
        at = self._format.head(self._text)
        if at is None:
            return False
        if at == BROKEN:
            self._give_up(0)
            return True
        self._at_bracket = at
        self._scanner = SpanScanner(is_python=self._format.is_python)
        return True

    def _read_call(self) -> bool:
        assert self._scanner is not None
        body = self._text[self._at_bracket :]
        is_complete = self._scanner.scan(body)
        if is_complete is None:
            return False
        size = self._scanner.num_read
        self._scanner = None
        if not is_complete:
            self._give_up(self._at_bracket + size)
            return True
        head = self._text[: self._at_bracket].strip()
        for mark in self._format.marks:
            head = head.removesuffix(mark)
        try:
            calls = self._format.read(head, body[:size], self._names)
        except NotACall:
            self._give_up(self._at_bracket + size)
            return True
        self._text = body[size:]
        self._begun, self._is_edge, self._gap = None, True, ""
        self._can_repeat = self._format.is_repeated
        self._add(calls)
        return True

    def _give_up(self, size: int) -> None:
        """Returns the mark and the next `size` characters as text."""
        self._out.append(self._gap + (self._begun or "") + self._text[:size])
        self._text = self._text[size:]
        self._begun, self._is_edge, self._gap = None, False, ""

    def _add(self, calls: tuple[Call, ...]) -> None:
        for call in calls if self._is_parallel else calls[:1]:
            self._calls.append(
                ToolCallDelta(
                    index=self._num_calls,
                    id=new_call_id(self._format),
                    name=call.name,
                    arguments=call.arguments,
                )
            )
            self._num_calls += 1


def num_characters_held(text: str, marks: Collection[str]) -> int:
    """Returns the length of the longest end of a text that may begin one of the marks."""
    longest = max((len(mark) - 1 for mark in marks), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(mark.startswith(tail) for mark in marks):
            return length
    return 0
