"""Parts of a job's result that may fail without the loss of the student, such as its evaluation."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from worker.disk import is_disk_full
from worker.distill.training.trainer import Stopped
from worker.errors import DiskFull
from worker.protocol.run_lines import MessageLine

T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_MESSAGE_CHARACTERS = 500


class MissingPart(BaseModel):
    """A part that the result lacks. `code` and `message` give the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str  # "evaluation", "ce_baseline", "ladder_plot", or the name of an export format
    code: str
    message: str

    def event(self, decision: str) -> MessageLine:
        """Returns a warning for the job's events. `decision` says what follows for the student."""
        message = f"{self.part} failed ({self.message}); {decision}"
        return MessageLine(level="warn", message=message, data=self.model_dump())


def attempt(part: str, code: str, work: Callable[[], T]) -> T | MissingPart:
    """Returns the result of `work`, or a `MissingPart` if it fails.

    Raises Stopped or DiskFull if `work` does. The job is then paused, and the part is computed when
    it resumes.
    """
    try:
        return work()
    except (Stopped, DiskFull):
        raise
    except Exception as error:
        if is_disk_full(error):
            raise
        log.exception("part_failed: %s", part)
        is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        message = f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARACTERS]
        missing = MissingPart(
            part=part, code="out_of_memory" if is_out_of_memory else code, message=message
        )
    # the memory of the failed part can be freed only after the error and its frames are gone
    gc.collect()
    return missing
