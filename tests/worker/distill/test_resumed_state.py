"""Warnings of a resumed run about what differs from the run that wrote its checkpoint."""

import pytest

from app.contracts.distillation import Precision
from worker.distill.resumed_state import changes_since
from worker.distill.training.checkpoint import TrainState

BEFORE = TrainState(num_threads=2, num_processes=1, precision="bfloat16")


def test_an_equal_run_has_no_warnings() -> None:
    assert list(changes_since(BEFORE, 2, 1, "bfloat16")) == []
    older = BEFORE.model_copy(update={"precision": None})
    assert list(changes_since(older, 2, 1, "float32")) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((4, 1, "bfloat16"), "with 2 threads and the run continues with 4"),
        ((2, 3, "bfloat16"), "by 1 processes and the run continues with 3"),
        ((2, 1, "float32"), "in bfloat16 and the run continues in float32"),
    ],
)
def test_each_difference_is_one_warning(changes: tuple[int, int, Precision], words: str) -> None:
    num_threads, num_processes, precision = changes
    (warning,) = changes_since(BEFORE, num_threads, num_processes, precision)
    assert words in warning
    assert "not bit-identical" in warning
