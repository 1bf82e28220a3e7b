"""Teachers of k tokens and a rest, against buckets summed up under autograd, and in the fused loss."""

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from app.contracts.distillation import DivergenceName
from tests.worker.distill.losses.test_divergences import plain_divergence
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import RowStats, fused_distillation_loss
from worker.distill.losses.lm_head import Head, TeacherRows, top_rows
from worker.distill.losses.top_k import TopRows, bucket_terms
from worker.errors import VocabMismatch

N, H, V, K = 9, 6, 31, 5
NAMES: tuple[DivergenceName, ...] = tuple(
    name for name in get_args(DivergenceName) if name != "logit_mse"
)
OBJECTIVES = [
    TokenObjective(name, alpha=0.3, beta=0.6, temperature=temperature, ce_weight=ce_weight)
    for name in NAMES
    for temperature, ce_weight in ((1.0, 0.0), (2.0, 0.3))
]


def draw(*shape: int, seed: int = 5) -> Tensor:
    return 2 * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def whole_rows(k: int = K) -> tuple[Tensor, Tensor, TopRows, Tensor]:
    """Student's and teacher's logits, the teacher's top rows, targets."""
    student, teacher = draw(N, V), draw(N, V, seed=6)
    return (
        student,
        teacher,
        top_rows(teacher, Head(torch.eye(V, dtype=torch.float64)), k),
        torch.arange(N),
    )


def into_buckets(z: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the named tokens and, last, of all others."""
    p = z.softmax(-1)
    is_named = torch.nn.functional.one_hot(ids, V).sum(1).bool()
    rest = torch.where(is_named, 0.0, p).sum(-1, keepdim=True)
    return torch.cat([p.gather(1, ids), rest], dim=1).log()


def plain_loss(
    student: Tensor, teacher: Tensor, ids: Tensor, targets: Tensor, o: TokenObjective
) -> Tensor:
    t, w = o.temperature, o.ce_weight
    p, q = ((into_buckets(z, ids) / t).softmax(-1) for z in (teacher, student))
    ce = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    return (1 - w) * t**2 * plain_divergence(p, q, o) + w * ce


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_loss_and_gradient_are_those_of_summed_buckets(objective: TokenObjective) -> None:
    student, teacher, top, targets = whole_rows()
    leaf = student.clone().requires_grad_()
    expected = plain_loss(leaf, teacher, top.ids_NK, targets, objective)
    expected.sum().backward()
    terms = bucket_terms(objective, student, top, targets)
    torch.testing.assert_close(terms.loss_N, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.gradient_NV, leaf.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradient_is_that_of_finite_differences(objective: TokenObjective) -> None:
    student, _, top, targets = whole_rows()
    numeric, step = torch.empty_like(student), 1e-5
    for v in range(V):
        nudge = torch.zeros(V, dtype=torch.float64)
        nudge[v] = step
        above = bucket_terms(objective, student + nudge, top, targets).loss_N
        below = bucket_terms(objective, student - nudge, top, targets).loss_N
        numeric[:, v] = (above - below) / (2 * step)
    gradient = bucket_terms(objective, student, top, targets).gradient_NV
    torch.testing.assert_close(gradient, numeric, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_but_one_are_the_whole_vocabulary(name: DivergenceName) -> None:
    student, teacher, top, targets = whole_rows(V - 1)
    objective = TokenObjective(name, alpha=0.3, beta=0.6, temperature=2.0, ce_weight=0.3)
    terms = bucket_terms(objective, student, top, targets)
    whole = objective.loss_and_gradient(student, teacher, targets)
    for found, expected in zip(vars(terms).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "alpha_beta"])
def test_buckets_are_a_lower_bound_that_rises_with_k(name: DivergenceName) -> None:
    student, teacher, _, targets = whole_rows()
    objective = TokenObjective(name, alpha=0.3, beta=0.6)
    bounds = [bucket_terms(objective, student, whole_rows(k)[2], targets) for k in (1, 4, 16)]
    bounds.append(objective.loss_and_gradient(student, teacher, targets))
    for low, high in pairwise(bounds):
        assert (low.loss_N <= high.loss_N + 1e-12).all()
        assert (low.kl_N <= high.kl_N + 1e-12).all()
        torch.testing.assert_close(low.ce_N, high.ce_N)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_float32_stays_finite_where_probabilities_underflow(objective: TokenObjective) -> None:
    _, teacher, _, targets = whole_rows()
    top = top_rows(500 * teacher.float(), Head(torch.eye(V)), K)
    for student in (
        500 * draw(N, V, seed=8).float(),
        500 * teacher.float(),
        -500 * teacher.float(),
    ):
        terms = bucket_terms(objective, student, top, targets)
        for found in vars(terms).values():
            assert found.isfinite().all()


@pytest.mark.parametrize(
    "objective", [TokenObjective("logit_mse"), TokenObjective(matches="rank")], ids=str
)
def test_what_needs_every_token_is_refused(objective: TokenObjective) -> None:
    student, _, top, targets = whole_rows()
    with pytest.raises(AssertionError):
        bucket_terms(objective, student, top, targets)


class Rows:
    """A student with a trained, capped head and a teacher cut down to its top rows."""

    def __init__(self) -> None:
        self.hidden = draw(N, H, seed=1).requires_grad_()
        self.weight = draw(V, H, seed=2).requires_grad_()
        self.bias = draw(V, seed=3).requires_grad_()
        self.head = Head(self.weight, self.bias, scale=0.5, softcap=3.0)
        _, self.teacher, self.top, self.targets = whole_rows()

    def fused(
        self, objective: TokenObjective, chunk_rows: int | None = None
    ) -> tuple[Tensor, RowStats]:
        return fused_distillation_loss(
            self.hidden,
            self.head,
            self.targets,
            TeacherRows(self.head, top=self.top),
            objective,
            denominator=7.0,
            chunk_rows=chunk_rows,
        )

    def logits(self) -> Tensor:
        return 3.0 * torch.tanh(0.5 * (self.hidden @ self.weight.T + self.bias) / 3.0)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.hidden, self.weight, self.bias]))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_fused_loss_takes_top_rows(objective: TokenObjective) -> None:
    rows = Rows()
    expected = (
        plain_loss(rows.logits(), rows.teacher, rows.top.ids_NK, rows.targets, objective).sum()
        / 7.0
    )
    loss, stats = rows.fused(objective, chunk_rows=4)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        rows.gradients(loss), rows.gradients(expected), rtol=1e-12, atol=1e-12
    )
    student = rows.logits()
    forward_kl = TokenObjective()
    kl = plain_loss(student, rows.teacher, rows.top.ids_NK, rows.targets, forward_kl).sum().item()
    assert stats.kl_sum == pytest.approx(kl)
    assert stats.num_agreeing == int((student.argmax(-1) == rows.teacher.argmax(-1)).sum())


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_chunks_change_nothing(objective: TokenObjective, chunk_rows: int) -> None:
    rows = Rows()
    whole, whole_stats = rows.fused(objective, chunk_rows=N)
    chunked, stats = rows.fused(objective, chunk_rows=chunk_rows)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        rows.gradients(chunked), rows.gradients(whole), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(stats.sums, whole_stats.sums, rtol=1e-13, atol=0)


def test_top_rows_of_another_vocabulary_are_refused() -> None:
    rows = Rows()
    rows.head = replace(rows.head, weight_VH=rows.weight[:-1], bias_V=rows.bias[:-1])
    teacher = TeacherRows(Head(rows.weight), top=rows.top)
    with pytest.raises(VocabMismatch):
        fused_distillation_loss(
            rows.hidden, rows.head, rows.targets, teacher, TokenObjective(), denominator=1.0
        )
