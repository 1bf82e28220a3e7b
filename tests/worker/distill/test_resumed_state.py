"""Warnings of a resumed run about what differs from the run that wrote its checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest

from app.contracts.batch_plan import CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS
from app.contracts.distillation import Precision
from worker.distill.data.rows import Example
from worker.distill.data_parallel import Ranks
from worker.distill.resumed_state import changes_since, step_tokens
from worker.distill.training.checkpoint import TrainState
from worker.protocol.run_spec import RunSpec

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


def test_a_resumed_run_keeps_its_batches_on_another_device(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    rows = [Example((5,) * 500, ((1, 500),))] * 5_000
    new, explicit = (make_spec(batch_tokens=tokens) for tokens in ("auto", 300))
    resumed = new.model_copy(update={"resume_dir": tmp_path})
    older = TrainState.model_validate_json('{"step": 3}')  # written before batches were recorded
    recorded = older.model_copy(update={"batch_tokens": 4_000})

    def tokens(spec: RunSpec, state: TrainState, device: str, count: int = 1) -> int:
        """Returns the tokens per batch of a run with `count` processes."""
        return step_tokens(spec, state, rows, device, Ranks(0, count))

    assert tokens(new, TrainState(), "cpu") == CPU_BATCH_TOKENS
    assert tokens(new, TrainState(), "cuda") == DEVICE_BATCH_TOKENS
    assert tokens(new, TrainState(), "cuda", count=2) == 5_000 * 500 // 200
    assert tokens(explicit, TrainState(), "cuda") == 300
    assert tokens(resumed, older, "cuda") == CPU_BATCH_TOKENS
    assert tokens(resumed, recorded, "cpu") == tokens(resumed, recorded, "cuda", 2) == 4_000
