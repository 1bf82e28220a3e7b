"""Progress of a long command as lines, for an output that is no terminal and shows no progress bar."""

import time
from typing import Final

from rich.console import Console

LINE_SECONDS: Final = 30.0


class ProgressLines:
    """Prints a line at most every `line_seconds`; nothing on a terminal, which has a progress bar."""

    def __init__(self, console: Console, line_seconds: float = LINE_SECONDS) -> None:
        self._console, self._line_seconds = console, line_seconds
        self._printed_at = time.monotonic()

    def tell(self, line: str) -> None:
        """Prints the line if it is time to."""
        if self._console.is_terminal or time.monotonic() - self._printed_at < self._line_seconds:
            return
        self._printed_at = time.monotonic()
        text = f"{time.strftime('%H:%M:%S')}  {line}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
