import errno
from collections.abc import Callable

import pytest
import torch

from worker.distill.missing_results import MissingPart, attempt
from worker.distill.training.trainer import Stopped
from worker.errors import DiskFull


def failing(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_what_succeeds_is_returned() -> None:
    assert attempt("evaluation", "evaluation_failed", lambda: 7) == 7


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no"), "evaluation_failed"),
        (MemoryError("no"), "out_of_memory"),
        (torch.OutOfMemoryError("no"), "out_of_memory"),
    ],
)
def test_a_failure_becomes_a_missing_part_and_a_warning(error: Exception, code: str) -> None:
    missing = attempt("evaluation", "evaluation_failed", failing(error))
    assert isinstance(missing, MissingPart)
    assert (missing.part, missing.code) == ("evaluation", code)
    event = missing.event("the student is registered without it")
    assert event.level == "warn"
    assert event.data == missing.model_dump()


@pytest.mark.parametrize("error", [Stopped(3), DiskFull("full"), OSError(errno.EDQUOT, "full")])
def test_a_stop_and_a_full_disk_are_no_missing_part(error: Exception) -> None:
    with pytest.raises(type(error)):
        attempt("evaluation", "evaluation_failed", failing(error))
