"""Differences between the run that wrote a checkpoint and the run that resumes from it."""

from collections.abc import Iterator, Sequence

from app.contracts.batch_plan import batch_tokens_of
from app.contracts.distillation import Precision
from worker.distill.data.rows import Example
from worker.distill.data_parallel import Ranks
from worker.distill.teachers.cached_teacher import CachedTeacher
from worker.distill.training.checkpoint import TrainState
from worker.protocol.run_spec import RunSpec


def step_tokens(
    spec: RunSpec, state: TrainState, rows: Sequence[Example], device: str, ranks: Ranks
) -> int:
    """Returns the tokens per batch. A resumed run keeps its number on every device.

    Older checkpoints do not record it. Their automatic number is that of a CPU on every device.
    """
    h = spec.distillation.hyperparameters
    if spec.resume_dir is not None:
        return state.batch_tokens or batch_tokens_of(h)
    num_tokens = sum(example.num_tokens for example in rows)
    return batch_tokens_of(h, device=device, num_tokens=num_tokens, num_processes=ranks.count)


def changes_since(
    state: TrainState, num_threads: int, num_processes: int, precision: Precision
) -> Iterator[str]:
    """Yields a warning for each property of this run that differs from those in the checkpoint.

    The order and the precision of sums depend on these properties.
    """
    before_and_now = (
        (f"with {state.num_threads} threads", f"with {num_threads}"),
        (f"by {state.num_processes} processes", f"with {num_processes}"),
        (f"in {state.precision}", f"in {precision}"),
    )
    has_changed = (
        state.num_threads != num_threads,
        state.num_processes != num_processes,
        state.precision not in (None, precision),
    )
    for (before, now), is_other in zip(before_and_now, has_changed, strict=True):
        if is_other:
            yield (
                f"the checkpoint was made {before} and the run continues {now}: its result will be close, but not "
                "bit-identical, to that of an uninterrupted run"
            )


def changed_inputs(
    state: TrainState, inputs_sha256: str, teacher: CachedTeacher | None
) -> Iterator[str]:
    """Yields a warning for each input of this run that differs from those of the checkpoint."""
    if state.inputs_sha256 != inputs_sha256:
        yield "the job's inputs have changed since the checkpoint: the result will not be bit-identical"
    if state.has_kept_rows and teacher is not None and not teacher.has_all_rows:
        yield (
            "the cache of this machine lacks rows of the teacher, some of which were kept while it answered: they are "
            "computed again, and the result may differ in its last bits from that of an uninterrupted run"
        )
