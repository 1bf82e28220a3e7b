"""What of the teacher a pair can use."""

import pytest

from app.contracts.distillation import TeacherSignal
from app.contracts.messages import ModelKind
from worker.distill.teachers.signals import choose_signal
from worker.errors import WorkerError


@pytest.mark.parametrize(
    ("teacher", "student", "has_one_tokenizer", "name"),
    [
        ("causal", "causal", True, "logits"),
        ("causal", "seq2seq", True, "logits"),
        ("seq2seq", "causal", True, "logits"),
        ("masked", "seq2seq", True, "conditional_mlm"),
        ("masked", "causal", True, "conditional_mlm"),
        ("causal", "causal", False, "uld"),
        ("causal", "seq2seq", False, "text"),
    ],
)
def test_auto_takes_what_the_pair_allows(
    teacher: ModelKind, student: ModelKind, has_one_tokenizer: bool, name: str
) -> None:
    signal = choose_signal("auto", teacher, student, has_one_tokenizer=has_one_tokenizer)
    assert signal.name == name
    assert signal.reason


@pytest.mark.parametrize(
    ("asked", "teacher", "has_one_tokenizer", "hint"),
    [
        ("logits", "masked", True, "conditional_mlm"),
        ("text", "masked", True, "hidden"),
        ("conditional_mlm", "causal", True, "logits"),
        ("logits", "causal", False, "uld"),
        ("hidden", "causal", False, "text"),
        ("auto", "masked", False, "fresh"),
    ],
)
def test_an_impossible_pair_is_refused_with_what_would_work(
    asked: TeacherSignal, teacher: ModelKind, has_one_tokenizer: bool, hint: str
) -> None:
    with pytest.raises(WorkerError, match=hint):
        choose_signal(asked, teacher, "causal", has_one_tokenizer=has_one_tokenizer)
