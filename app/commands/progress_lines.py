"""Progress lines of a long command, for output that is not a terminal."""

import time
from typing import Final

from rich.console import Console

from app.commands.shell import escaped

LINE_SECONDS: Final = 30.0
ENDED: Final = frozenset({"succeeded", "failed", "cancelled"})  # statuses of jobs and imports


class ProgressLines:
    """Prints at most one line every `line_seconds` seconds.

    Prints nothing on a terminal, because a progress bar is shown there.
    """

    def __init__(self, console: Console, line_seconds: float = LINE_SECONDS) -> None:
        self._console, self._line_seconds = console, line_seconds
        self._printed_at = time.monotonic()

    def tell(self, line: str, *, is_due: bool = False, at: float | None = None) -> None:
        """Prints the line if it is due, or if `line_seconds` have passed since the last one.

        `at` is the time shown, in seconds since the epoch; by default it is now.
        """
        is_late = time.monotonic() - self._printed_at >= self._line_seconds
        if self._console.is_terminal or not (is_due or is_late):
            return
        self._printed_at = time.monotonic()
        text = escaped(f"{clock(at)}  {line}")
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def clock(at: float | None = None) -> str:
    """Returns a time in seconds since the epoch, or now, as local time of day."""
    return time.strftime("%H:%M:%S", time.localtime(at))
