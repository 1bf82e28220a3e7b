"""Universal logit distillation (ULD), for a teacher and a student with different tokenizers.

Sorted distributions are compared at tokens that begin at the same place of the text.
Source: Boizard et al., arXiv:2402.12030. The paper compares equal positions instead.

N rows (one per target of the student), M rows that are aligned with a target of the teacher,
H hidden width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worker.distill.data.dataset import Reader, Rows
from worker.distill.data.rows import Example
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import RowStats, fused_distillation_loss
from worker.distill.losses.lm_head import Head, TeacherRows
from worker.distill.losses.token_alignment import TokenBytes, align
from worker.errors import TokenizerMismatch
from worker.host_copies import to_device

# Ranks do not say which token is meant, so a student learns nothing without cross-entropy.
DEFAULT_CE_WEIGHT = 0.5


@dataclass(frozen=True)
class Aligned:
    """Rows as the teacher encodes them, with only those targets that have a partner.

    The partner of a target is a target of the student that begins at the same place of the text.
    """

    examples: list[Example]
    masks: list[Tensor]  # per row: whether each target of the student has a partner

    @property
    def share(self) -> float:
        """Share of the student's targets that have a partner."""
        return float(torch.cat(self.masks).double().mean())


def align_rows(rows: Rows, student: Reader, teacher: Reader, *, has_one_tokenizer: bool) -> Aligned:
    """Aligns the targets of the student with those of the teacher, row by row.

    Raises TokenizerMismatch if no target of the student has a partner.
    """
    students = [*rows.train, *rows.valid]
    if has_one_tokenizer:  # both views have the same targets
        return Aligned(
            rows.teacher,
            [torch.ones(example.num_targets, dtype=torch.bool) for example in students],
        )
    of_student, of_teacher = TokenBytes(student.tokenizer), TokenBytes(teacher.tokenizer)
    examples, masks = [], []
    for read, taught in zip(students, rows.teacher, strict=True):
        numbers, positions = align(read, taught, of_student, of_teacher)
        mask = torch.zeros(read.num_targets, dtype=torch.bool)
        mask[numbers] = True
        masks.append(mask)
        examples.append(replace(taught, spans=tuple((p, p + 1) for p in positions)))
    aligned = Aligned(examples, masks)
    if aligned.share == 0.0:
        raise TokenizerMismatch(
            "no token of the student begins at the same position as a token of the teacher, so uld has nothing to "
            'compare; use objective.teacher_signal = "text"'
        )
    return aligned


def teacher_loss(
    student_hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    teacher: TeacherRows | None,
    objective: TokenObjective,
    *,
    denominator: float,
) -> tuple[Tensor, RowStats]:
    """Returns `fused_distillation_loss` for a teacher that may cover only some of the rows.

    The loss of the other rows is cross-entropy alone, times `ce_weight`. Each row passes through
    the student's head once.
    """
    if teacher is None or teacher.mask_N is None:
        return fused_distillation_loss(
            student_hidden_NH, head, targets_N, teacher, objective, denominator=denominator
        )
    at_M, others = (
        to_device(mask_N.nonzero()[:, 0], targets_N.device)
        for mask_N in (teacher.mask_N, ~teacher.mask_N)
    )
    loss, stats = fused_distillation_loss(
        student_hidden_NH[at_M], head, targets_N[at_M], teacher, objective, denominator=denominator
    )
    if not objective.ce_weight or not len(others):
        return loss, stats
    text_loss, text_stats = fused_distillation_loss(
        student_hidden_NH[others],
        head,
        targets_N[others],
        None,
        objective,
        denominator=denominator / objective.ce_weight,
    )
    sums = text_stats.sums.clone()
    sums[0] *= objective.ce_weight
    return loss + text_loss, stats + RowStats(text_stats.num_rows, sums)
