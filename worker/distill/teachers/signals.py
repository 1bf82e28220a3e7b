"""Chooses the signal that a pair of models uses, also for `auto`."""

from dataclasses import dataclass

from app.contracts.distillation import TeacherSignal
from app.contracts.messages import ModelKind
from worker.errors import TokenizerMismatch, UnsupportedModel


@dataclass(frozen=True)
class Signal:
    """Signal that the student learns from, and why it was chosen."""

    name: TeacherSignal
    reason: str

    @property
    def has_distribution(self) -> bool:
        """True if the teacher's distributions are compared with the student's."""
        return self.name in ("logits", "conditional_mlm", "uld")

    @property
    def has_ranks(self) -> bool:
        """True if the distributions are over two vocabularies.

        They are then compared by rank, and only where tokens begin alike.
        """
        return self.name == "uld"


def choose_signal(
    asked: TeacherSignal | str, teacher: ModelKind, student: ModelKind, *, has_one_tokenizer: bool
) -> Signal:
    """Returns the requested signal, or the best one for `auto`.

    Raises:
        UnsupportedModel: The teacher's kind of model cannot give the signal.
        TokenizerMismatch: The signal needs a shared tokenizer.
    """
    if asked == "auto":
        return _best_signal(teacher, student, has_one_tokenizer=has_one_tokenizer)
    if asked in ("logits", "uld", "text") and teacher == "masked":
        raise UnsupportedModel(
            "a masked language model has no next-token distribution and does not generate text; use "
            'objective.teacher_signal = "conditional_mlm" or "hidden"'
        )
    if asked == "conditional_mlm" and teacher != "masked":
        raise UnsupportedModel(
            f'conditional_mlm needs a masked language model (BERT, RoBERTa) as teacher; use "logits" for a {teacher} one'
        )
    if not has_one_tokenizer and asked not in ("text", "uld"):
        raise TokenizerMismatch(
            f'student and teacher have different tokenizers, so {asked} cannot be compared token by token; use "uld" or '
            '"text", or a pair that shares a tokenizer'
        )
    best = _best_signal(teacher, student, has_one_tokenizer=has_one_tokenizer)
    if asked == best.name:  # the submission may already have resolved `auto`
        return best
    return Signal(asked, "requested")  # type: ignore[arg-type]  # what is not auto is a TeacherSignal


def _best_signal(teacher: ModelKind, student: ModelKind, *, has_one_tokenizer: bool) -> Signal:
    if teacher == "masked":
        if not has_one_tokenizer:
            raise TokenizerMismatch(
                "a masked teacher needs a student with the same tokenizer; use one that has it, such as a student with "
                'student.init = "fresh"'
            )
        return Signal(
            "conditional_mlm", "a masked teacher predicts a token from the tokens on both sides"
        )
    if has_one_tokenizer:
        return Signal("logits", "both models share a tokenizer")
    if teacher == student:
        return Signal(
            "uld",
            "the tokenizers differ, so distributions are compared by rank where tokens begin at the same position",
        )
    return Signal(
        "text", "tokenizers and model families differ, so the student learns the teacher's text"
    )
