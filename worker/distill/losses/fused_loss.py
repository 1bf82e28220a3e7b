"""Fused LM head and distillation loss, computed in chunks of rows.

No [N, V] tensor is created. A chunk's logits are in a scratch buffer that the next chunk reuses.
The forward pass also computes the gradients. It keeps the gradient of the hidden states, [N, H],
and that of the head unless the head is frozen.

N rows (one per target), C rows of a chunk, G rows of a group within a chunk. H hidden width, which
may differ between student and teacher. V vocabulary, U the teacher's vocabulary (the same unless
ranks are matched).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from worker.cpu import LossKernel, loss_kernel
from worker.distill.losses.divergences import TokenObjective, row_dot
from worker.distill.losses.lm_head import (
    Head,
    HeadGradient,
    TeacherRows,
    matmul,
    new_scratch,
    scratch_dtype,
    split_groups,
    split_rows,
    write_logits,
)
from worker.distill.losses.top_k import bucket_terms
from worker.errors import VocabMismatch


@dataclass(frozen=True)
class RowStats:
    """Sums of loss, KL, cross-entropy (CE) and agreement over rows.

    The sums stay on the device until a property reads one. KL is KL(p || q) and CE is with the
    targets, both at temperature 1. For top-k teachers, KL is a lower bound. KL and agreement are 0
    if ranks are matched. Without a teacher KL is 0, and agreement is with the targets. `rows_N4`
    has the four values per row if they were requested; adding two RowStats drops it.
    """

    num_rows: int
    sums: Tensor
    rows_N4: Tensor | None = None

    @property
    def loss_sum(self) -> float:
        return float(self.sums[0])

    @property
    def kl_sum(self) -> float:
        return float(self.sums[1])

    @property
    def ce_sum(self) -> float:
        return float(self.sums[2])

    @property
    def num_agreeing(self) -> int:
        """Number of rows where teacher and student have the same most likely token.

        Without a teacher it is the number of rows whose most likely token is the target.
        """
        return int(self.sums[3])

    def __add__(self, other: "RowStats") -> "RowStats":
        return RowStats(self.num_rows + other.num_rows, self.sums + other.sums)

    @classmethod
    def zero(cls) -> "RowStats":
        return cls(0, torch.zeros(4, dtype=torch.float64))


def fused_distillation_loss(
    student_hidden_NH: Tensor,
    student_head: Head,
    targets_N: Tensor,
    teacher: TeacherRows | None,
    objective: TokenObjective,
    *,
    denominator: float,
    chunk_rows: int | None = None,
    keeps_rows: bool = False,
) -> tuple[Tensor, RowStats]:
    """Returns the sum of the rows' losses divided by `denominator`, and statistics of the rows.

    The loss is differentiable in the hidden states and the student's head, and can be
    backpropagated once. Under `torch.no_grad` no gradients are computed. Without a teacher the loss
    is cross-entropy with the targets. `denominator` is the number of targets of the whole optimizer
    step, so that micro-batches of unequal size weigh their tokens alike.

    Raises VocabMismatch if the objective matches tokens and the heads' numbers of tokens differ.
    """
    assert denominator > 0
    if (
        teacher
        and objective.matches == "token"
        and student_head.num_tokens != teacher.head.num_tokens
    ):
        raise VocabMismatch(
            f"the student has {student_head.num_tokens} tokens and the teacher {teacher.head.num_tokens}; "
            "pick a pair that shares a tokenizer"
        )
    weight_VH, bias_V = student_head.weight_VH, student_head.bias_V
    is_head_trained = weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if not torch.is_grad_enabled():  # needs_input_grad of a Function ignores no_grad
        student_hidden_NH, weight_VH = student_hidden_NH.detach(), weight_VH.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    rows_N4 = (
        student_hidden_NH.new_empty((len(targets_N), 4), dtype=torch.float64)
        if keeps_rows
        else None
    )
    job = _Job(
        student_head,
        is_head_trained,
        targets_N,
        teacher,
        objective,
        denominator,
        chunk_rows,
        rows_N4,
    )
    # autocast of the model must not change the dtypes of the loss
    with torch.autocast(student_hidden_NH.device.type, enabled=False):
        # torch leaves apply untyped
        loss, sums = _FusedLoss.apply(student_hidden_NH, weight_VH, bias_V, job)  # type: ignore[no-untyped-call]
    return loss, RowStats(len(targets_N), sums, rows_N4)


@dataclass(frozen=True)
class _Job:
    """Arguments of one fused loss that are not differentiated."""

    head: Head
    is_head_trained: bool
    targets_N: Tensor
    teacher: TeacherRows | None
    objective: TokenObjective
    denominator: float
    chunk_rows: int | None
    rows_N4: Tensor | None

    def can_use_expected(self) -> bool:
        """Returns whether the loss can be computed from the teacher's ExpectedRows."""
        assert self.teacher is not None
        is_exact = self.objective.is_forward_kl and not self.is_head_trained
        if self.teacher.expected is not None and is_exact:
            return True
        assert self.teacher.hidden_NH is not None, (
            "expected rows need forward KL at T = 1 and a frozen head"
        )
        return False

    def totals(self, rows: slice, group: slice, terms: tuple[Tensor, ...]) -> Tensor:
        """Returns the sums of the terms over a group of rows. Fills `rows_N4` if it is given."""
        terms_4G = torch.stack([term.to(terms[0].dtype) for term in terms])
        if self.rows_N4 is not None:
            self.rows_N4[rows][group] = terms_4G.t()
        return terms_4G.sum(dim=1, dtype=torch.float64)


class _FusedLoss(torch.autograd.Function):
    """Autograd function that computes all gradients in its forward pass."""

    @staticmethod
    def forward(  # ctx is Any: torch does not type what a context carries
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss and the sums of its terms, and saves the gradients."""
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dtype = scratch_dtype(job.head)
        sums_of = _Gradients(
            hidden_NH=torch.empty_like(hidden_NH) if needs_hidden else None,
            weight=HeadGradient(dtype, job.head.body_dtype) if needs_weight else None,
            bias_V=torch.zeros_like(bias_V, dtype=dtype)
            if needs_bias and bias_V is not None
            else None,
        )
        chunks = split_rows(len(hidden_NH), job.head, job.chunk_rows)
        student_CV = new_scratch(chunks, job.head)
        totals = torch.zeros(4, dtype=torch.float64, device=hidden_NH.device)
        if job.teacher is None:
            for rows in chunks:
                totals += _text_chunk(job, hidden_NH, rows, student_CV, sums_of)
        elif job.teacher.top is not None:
            for rows in chunks:
                totals += _top_chunk(job, hidden_NH, rows, student_CV, sums_of)
        elif job.can_use_expected():
            for rows in chunks:
                totals += _expected_chunk(job, hidden_NH, rows, student_CV, sums_of)
        else:
            teacher_CU = student_CV.new_empty(len(student_CV), job.teacher.head.num_tokens)
            for rows in chunks:
                totals += _full_chunk(job, hidden_NH, rows, student_CV, teacher_CU, sums_of)
        ctx.save_for_backward(
            sums_of.hidden_NH,
            None if sums_of.weight is None else sums_of.weight.of(weight_VH),
            None if sums_of.bias_V is None or bias_V is None else sums_of.bias_V.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(totals)
        return (totals[0] / job.denominator).to(dtype), totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the saved gradients times the gradient of the loss."""
        is_on_cpu = grad_loss.device.type == "cpu"  # on a GPU item() would synchronise
        if is_on_cpu and grad_loss.item() == 1.0:
            return (*ctx.saved_tensors, None)
        return (*(None if g is None else g * grad_loss for g in ctx.saved_tensors), None)


@dataclass(frozen=True)
class _Gradients:
    """Accumulated gradients. A gradient that is not needed is None."""

    hidden_NH: Tensor | None
    weight: HeadGradient | None
    bias_V: Tensor | None

    def add(self, head: Head, hidden_CH: Tensor, rows: slice, slope_CV: Tensor) -> None:
        """Propagates a chunk's gradient in h W^T + b to h, W and b."""
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = matmul(slope_CV, head)
        if self.bias_V is not None:
            self.bias_V.add_(slope_CV.sum(dim=0))
        if self.weight is not None:
            self.weight.add(slope_CV, hidden_CH)


def _full_chunk(
    job: _Job,
    hidden_NH: Tensor,
    rows: slice,
    student_CV: Tensor,
    teacher_CU: Tensor,
    gradients: _Gradients,
) -> Tensor:
    """Returns the sums of a chunk's terms, from the logits of both heads.

    The student's logits are overwritten with their gradient.
    """
    assert job.teacher is not None
    assert job.teacher.hidden_NH is not None
    student_CV = write_logits(job.head, hidden_NH[rows], student_CV)
    teacher_CU = write_logits(job.teacher.head, job.teacher.hidden_NH[rows], teacher_CU)
    targets_C = job.targets_N[rows]
    if (compute := _kernel_for(job, student_CV)) is not None:
        objective = job.objective
        terms_C4 = compute(
            student_CV,
            teacher_CU,
            targets_C,
            beta=None if objective.is_forward_kl else objective.beta,
            ce_weight=objective.ce_weight,
            factor=job.head.scale / job.denominator,
        )
        gradients.add(job.head, hidden_NH[rows], rows, student_CV)
        return job.totals(rows, slice(0, len(terms_C4)), terms_C4.unbind(dim=1))
    totals = torch.zeros(4, dtype=torch.float64, device=hidden_NH.device)
    for group in split_groups(student_CV):
        z_GV = student_CV[group]
        terms = job.objective.loss_and_gradient(z_GV, teacher_CU[group], targets_C[group])
        if job.objective.matches == "rank":
            is_agreed_G = torch.zeros_like(terms.loss_N)
        else:
            is_agreed_G = _agrees(z_GV, teacher_CU[group].argmax(dim=-1))
        totals += job.totals(rows, group, (terms.loss_N, terms.kl_N, terms.ce_N, is_agreed_G))
        _replace_logits(z_GV, terms.gradient_NV, job)
    gradients.add(job.head, hidden_NH[rows], rows, student_CV)
    return totals


def _kernel_for(job: _Job, student_CV: Tensor) -> LossKernel | None:
    """Returns the compiled loss if it supports the objective, the dtype and the device."""
    is_known = job.objective.is_forward_kl or job.objective.is_jensen_shannon
    return loss_kernel(student_CV) if is_known and job.head.softcap is None else None


def _text_chunk(
    job: _Job, hidden_NH: Tensor, rows: slice, student_CV: Tensor, gradients: _Gradients
) -> Tensor:
    """Returns the sums of a chunk's terms without a teacher: cross-entropy with the targets."""
    student_CV = write_logits(job.head, hidden_NH[rows], student_CV)
    targets_C = job.targets_N[rows]
    totals = torch.zeros(4, dtype=torch.float64, device=hidden_NH.device)
    for group in split_groups(student_CV):
        z_GV, targets_G1 = student_CV[group], targets_C[group][:, None]
        derivative_GV = (
            None if job.head.softcap is None else 1.0 - (z_GV / job.head.softcap).square()
        )
        target_z_G = z_GV.gather(1, targets_G1)[:, 0]
        is_correct_G = target_z_G == z_GV.amax(dim=-1)
        ce_G = _softmax_(z_GV) - target_z_G
        totals += job.totals(rows, group, (ce_G, torch.zeros_like(ce_G), ce_G, is_correct_G))
        z_GV.scatter_add_(1, targets_G1, z_GV.new_full(targets_G1.shape, -1.0))
        if derivative_GV is not None:
            z_GV.mul_(derivative_GV)
        z_GV.mul_(job.head.scale / job.denominator)
    gradients.add(job.head, hidden_NH[rows], rows, student_CV)
    return totals


def _top_chunk(
    job: _Job, hidden_NH: Tensor, rows: slice, student_CV: Tensor, gradients: _Gradients
) -> Tensor:
    """Returns the sums of a chunk's terms, from the teacher's top-k tokens."""
    assert job.teacher is not None
    assert job.teacher.top is not None
    top = job.teacher.top[rows]
    student_CV = write_logits(job.head, hidden_NH[rows], student_CV)
    targets_C = job.targets_N[rows]
    totals = torch.zeros(4, dtype=torch.float64, device=hidden_NH.device)
    for group in split_groups(student_CV):
        z_GV = student_CV[group]
        terms = bucket_terms(job.objective, z_GV, top[group], targets_C[group])
        is_agreed_G = _agrees(z_GV, top.ids_NK[group][:, 0])
        totals += job.totals(rows, group, (terms.loss_N, terms.kl_N, terms.ce_N, is_agreed_G))
        _replace_logits(z_GV, terms.gradient_NV, job)
    gradients.add(job.head, hidden_NH[rows], rows, student_CV)
    return totals


def _replace_logits(z_GV: Tensor, gradient_GV: Tensor, job: _Job) -> None:
    """Overwrites logits with the gradient in h W^T + b. Also modifies `gradient_GV`."""
    if job.head.softcap is not None:
        gradient_GV.mul_(1.0 - (z_GV / job.head.softcap).square())  # derivative of tanh
    torch.mul(gradient_GV, job.head.scale / job.denominator, out=z_GV)


def _expected_chunk(
    job: _Job, hidden_NH: Tensor, rows: slice, student_CV: Tensor, gradients: _Gradients
) -> Tensor:
    """Returns the sums of a chunk's terms for forward KL at T = 1, without teacher logits."""
    assert job.teacher is not None
    assert job.teacher.expected is not None
    expected, ce_weight = job.teacher.expected, job.objective.ce_weight
    student_CV = write_logits(job.head, hidden_NH[rows], student_CV)
    targets_C = job.targets_N[rows]
    expected_CH = expected.head_NH[rows].to(student_CV.dtype)
    mean_logit_C = row_dot(expected_CH, hidden_NH[rows].to(student_CV.dtype))
    totals = torch.zeros(4, dtype=torch.float64, device=hidden_NH.device)
    for group in split_groups(student_CV):
        z_GV = student_CV[group]
        targets_G1 = targets_C[group][:, None]
        target_z_G = z_GV.gather(1, targets_G1)[:, 0]
        is_agreed_G = _agrees(z_GV, expected.top_N[rows][group])
        log_norm_G = _softmax_(z_GV)
        ce_G = log_norm_G - target_z_G
        kl_G = expected.neg_entropy_N[rows][group] - mean_logit_C[group] + log_norm_G
        totals += job.totals(
            rows, group, (torch.lerp(kl_G, ce_G, ce_weight), kl_G, ce_G, is_agreed_G)
        )
        if ce_weight:
            z_GV.scatter_add_(1, targets_G1, z_GV.new_full(targets_G1.shape, -ce_weight))
        z_GV.mul_(job.head.scale / job.denominator)
    gradients.add(job.head, hidden_NH[rows], rows, student_CV)
    if gradients.hidden_NH is not None:
        gradients.hidden_NH[rows].sub_(expected_CH, alpha=(1 - ce_weight) / job.denominator)
    return totals


def _softmax_(z_NV: Tensor) -> Tensor:
    """Replaces logits by probabilities in place, and returns the logsumexp of each row."""
    top_N1 = z_NV.amax(dim=-1, keepdim=True)
    total_N1 = z_NV.sub_(top_N1).exp_().sum(dim=-1, keepdim=True)
    z_NV.div_(total_N1)
    return top_N1.add_(total_N1.log_())[:, 0]


def _agrees(z_NV: Tensor, top_N: Tensor) -> Tensor:
    """Returns whether `top_N` has the largest logit. On a CPU amax is much faster than argmax."""
    return z_NV.gather(1, top_N[:, None])[:, 0] == z_NV.amax(dim=-1)
