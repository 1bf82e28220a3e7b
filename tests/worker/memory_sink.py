"""A run's lines, kept."""

from collections.abc import Callable

from worker.protocol.run_lines import MessageLine, RunLine, StageLine


class MemorySink:
    """Keeps the lines in a list."""

    def __init__(self) -> None:
        self.lines: list[RunLine] = []

    def __call__(self, line: RunLine, /) -> None:
        self.lines.append(line)

    @property
    def warnings(self) -> list[MessageLine]:
        return [
            line for line in self.lines if isinstance(line, MessageLine) and line.level == "warn"
        ]


class FaultAtStage(MemorySink):
    """Keeps the lines, and breaks something as soon as the run enters a stage."""

    def __init__(self, stage: str, break_it: Callable[[], object]) -> None:
        super().__init__()
        self.stage = stage
        self.break_it = break_it

    def __call__(self, line: RunLine, /) -> None:
        super().__call__(line)
        if isinstance(line, StageLine) and line.name == self.stage:
            self.break_it()
