"""A run's lines, kept."""

from worker.distill.progress import RunLine


class MemorySink:
    """Keeps the lines in a list."""

    def __init__(self) -> None:
        self.lines: list[RunLine] = []

    def __call__(self, line: RunLine, /) -> None:
        self.lines.append(line)
