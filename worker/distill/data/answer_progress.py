"""Progress of a run while the teacher answers its rows."""

import time
from collections.abc import Callable

from worker.distill.data.answer_cache import OnProgress
from worker.protocol.run_lines import ProgressLine, Sink, Throttle

LOADED_PERCENT = 2.0  # progress of the run when the teacher begins to answer, or training begins
ANSWERED_PERCENT = 30.0  # progress of the run when the teacher has answered all rows


def share_of(tell: Callable[[float], None]) -> OnProgress:
    """Returns a callback that passes on the share of the rows that are answered."""
    return lambda num_done, num_wanted, num_tokens: tell(num_done / num_wanted)


class AnswerProgress:
    """Reports the progress of the teacher's answers, and stops the run if requested."""

    def __init__(self, sink: Sink, check_stop: Callable[[], None]) -> None:
        self.sink = sink
        self.check_stop = check_stop
        self.throttle = Throttle()
        self.begun = time.monotonic()
        self.num_before: int | None = None

    def __call__(self, num_done: int, num_wanted: int, num_tokens: int) -> None:
        self.check_stop()
        if self.num_before is None:
            self.num_before = num_done
        if not self.throttle.is_due():
            return
        seconds, num_made = time.monotonic() - self.begun, num_done - self.num_before
        share = num_done / num_wanted
        self.sink(
            ProgressLine(
                percent=round(LOADED_PERCENT + (ANSWERED_PERCENT - LOADED_PERCENT) * share, 1),
                tokens_per_second=round(num_tokens / max(seconds, 1e-6), 1),
                seconds_remaining=round(seconds / num_made * (num_wanted - num_done), 1)
                if num_made
                else None,
                rows_done=num_done,
                rows_total=num_wanted,
            )
        )
