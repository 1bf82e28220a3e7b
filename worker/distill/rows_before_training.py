"""Rows of the teacher's outputs that a run stores before its training.

Those of answers that the teacher has generated in this run come from the states that it computed
then. Others are computed ahead only if the training cannot compute them.
"""

from collections.abc import Callable
from pathlib import Path

from worker.distill.data.answer_progress import ANSWERED_PERCENT, LOADED_PERCENT
from worker.distill.data.answer_states import AnswerStates
from worker.distill.data.dataset import Rows
from worker.distill.data_parallel import Ranks
from worker.distill.model_pair import ModelPair
from worker.distill.teachers.cached_teacher import CachedTeacher
from worker.models.architectures import kind_of
from worker.protocol.run_lines import ProgressLine, Sink, StageLine, Throttle


def keeps_states(pair: ModelPair) -> bool:
    """Returns whether the states of generated answers can serve as rows of the teacher.

    On a GPU, generation takes many times as long as reading the answers once more, and CUDA graphs
    hide the states. Rows for two tokenizers are at other positions than the generated tokens.
    """
    is_causal = kind_of(pair.teacher.config) == "causal"
    is_used = pair.spec.has_teacher and pair.spec.cache_bytes > 0
    return is_used and is_causal and pair.card.name == "cpu" and pair.signal.name == "logits"


def answer_states(pair: ModelPair, folder: Path) -> AnswerStates | None:
    """Returns an empty store for the states of answers, or None if they are of no use."""
    return AnswerStates(folder, pair.spec.cache_bytes) if keeps_states(pair) else None


def keep_answered(
    teacher: CachedTeacher, rows: Rows, sink: Sink | None, check_stop: Callable[[], None]
) -> None:
    """Stores the rows whose states were kept. `check_stop` raises if the run has to stop.

    `sink` is None after the training, whose progress must not fall back.
    """
    if rows.states is not None and len(rows.states):
        teacher.keep(rows.states_of, _progress(sink, check_stop, ANSWERED_PERCENT))


def compute_rows(
    teacher: CachedTeacher,
    ranks: Ranks,
    micro_tokens: int,
    sink: Sink,
    check_stop: Callable[[], None],
) -> None:
    """Computes and stores all missing rows. `check_stop` raises if the run has to stop."""
    teacher.fill(ranks, micro_tokens, _progress(sink, check_stop, LOADED_PERCENT))


def _progress(
    sink: Sink | None, check_stop: Callable[[], None], percent: float
) -> Callable[[int, int], None]:
    throttle = Throttle()
    has_begun = False

    def tell(num_done: int, num_wanted: int) -> None:
        """Reports the stage once, and progress."""
        nonlocal has_begun
        check_stop()
        if sink is None:
            return
        if not has_begun:
            sink(StageLine(name="storing_teacher_outputs"))
            has_begun = True
        if throttle.is_due():
            sink(ProgressLine(percent=percent, rows_done=num_done, rows_total=num_wanted))

    return tell
