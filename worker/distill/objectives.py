"""Token-level divergences between a teacher p and a student q, each with its exact gradient.

N rows (completion positions), V vocabulary; z are raw logits, T is the temperature, q = softmax(z_student / T).
Every divergence D(p, q) has dD/dz = (1/T) q*(g - <q, g>) with g = dD/dq, so no autograd is needed. A divergence
here returns D a row, in nats, and its slope q*(g - <q, g>); both stay finite in float32 for finite logits,
because ratios are taken between logarithms. All four are checked against autograd and finite differences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.distillation import DivergenceName, Objective, Phase

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q): the student covers everything the teacher says. Slope q - p."""
    p_NV = log_p_NV.exp()
    loss_N = row_dot(p_NV, log_p_NV - log_q_NV)
    return loss_N, log_q_NV.exp().sub_(p_NV)


def reverse_kl(log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p): the student keeps to what the teacher finds likely. g = log(q/p)."""
    q_NV = log_q_NV.exp()
    ratio_NV = log_q_NV - log_p_NV
    loss_N = row_dot(q_NV, ratio_NV)
    return loss_N, ratio_NV.sub_(loss_N[:, None]).mul_(q_NV)


def jensen_shannon(log_q_NV: Tensor, log_p_NV: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. g = (1 - beta) log(q/m).

    Source: Agarwal et al., arXiv:2306.13649.
    """
    log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
    p_part_N = row_dot(log_p_NV.exp(), log_p_NV - log_m_NV)
    q_NV = log_q_NV.exp()
    ratio_NV = torch.sub(log_q_NV, log_m_NV, out=log_m_NV)
    q_part_N = row_dot(q_NV, ratio_NV)
    slope_NV = ratio_NV.sub_(q_part_N[:, None]).mul_(q_NV).mul_(1 - beta)
    return beta * p_part_N + (1 - beta) * q_part_N, slope_NV


def skew_forward_kl(log_q_NV: Tensor, log_p_NV: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(p || m) with m = alpha p + (1 - alpha) q, at most log(1/alpha). g = -(1 - alpha) p/m.

    Source: Ko et al. (DistiLLM), arXiv:2402.03898.
    """
    log_m_NV = torch.logaddexp(log_p_NV + math.log(alpha), log_q_NV + math.log1p(-alpha))
    ratio_NV = torch.sub(log_p_NV, log_m_NV, out=log_m_NV)
    loss_N = row_dot(log_p_NV.exp(), ratio_NV)
    q_NV = log_q_NV.exp()
    g_NV = ratio_NV.exp_().mul_(alpha - 1)  # p/m is at most 1/alpha
    return loss_N, g_NV.sub_(row_dot(q_NV, g_NV)[:, None]).mul_(q_NV)


def row_dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """Inner product of each pair of rows."""
    product_N: Tensor = torch.linalg.vecdot(a_NV, b_NV)
    return product_N


@dataclass(frozen=True)
class TokenObjective:
    """(1 - ce_weight) T² D(p, q) + ce_weight CE(target), a row."""

    divergence: DivergenceName = "forward_kl"
    alpha: float = 0.1
    beta: float = 0.5
    temperature: float = 1.0
    ce_weight: float = 0.0

    @classmethod
    def from_objective(cls, objective: Objective, phase: Phase | None = None) -> "TokenObjective":
        """The objective of the first phase, or of `phase`, which keeps temperature and ce_weight."""
        chosen = phase or objective
        return cls(
            divergence=chosen.divergence,
            alpha=0.1 if chosen.alpha is None else chosen.alpha,
            beta=0.5 if chosen.beta is None else chosen.beta,
            temperature=objective.temperature,
            ce_weight=objective.ce_weight,
        )

    def measure(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence and its slope, before T², the gradient's 1/T and the weights."""
        match self.divergence:
            case "forward_kl":
                return forward_kl(log_q_NV, log_p_NV)
            case "reverse_kl":
                return reverse_kl(log_q_NV, log_p_NV)
            case "jsd":
                return jensen_shannon(log_q_NV, log_p_NV, beta=self.beta)
            case "skew_forward_kl":
                return skew_forward_kl(log_q_NV, log_p_NV, alpha=self.alpha)

    def loss_and_gradient(self, student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> "RowTerms":
        """Loss of each row and its gradient in the student's raw logits, with what evaluation wants to know."""
        log_q_NV = torch.log_softmax(student_NV, dim=-1)
        log_p_NV = torch.log_softmax(teacher_NV, dim=-1)
        ce_N = -log_q_NV.gather(1, targets_N[:, None])[:, 0]
        t = self.temperature
        if t == 1.0:
            loss_N, gradient_NV = self.measure(log_q_NV, log_p_NV)
        else:
            loss_N, gradient_NV = self.measure(
                torch.log_softmax(student_NV / t, dim=-1), torch.log_softmax(teacher_NV / t, dim=-1)
            )
            loss_N, gradient_NV = loss_N * t**2, gradient_NV.mul_(t)  # T² times the gradient's 1/T
        if t == 1.0 and self.divergence == "forward_kl":
            kl_N = loss_N
        else:
            kl_N = row_dot(log_p_NV.exp(), log_p_NV.sub_(log_q_NV))
        if self.ce_weight:
            loss_N = torch.lerp(loss_N, ce_N, self.ce_weight)
            ce_gradient_NV = log_q_NV.exp_()
            ce_gradient_NV.scatter_add_(
                1, targets_N[:, None], ce_gradient_NV.new_full((len(targets_N), 1), -1.0)
            )
            gradient_NV = gradient_NV.lerp_(ce_gradient_NV, self.ce_weight)
        return RowTerms(loss_N=loss_N, gradient_NV=gradient_NV, kl_N=kl_N, ce_N=ce_N)


@dataclass(frozen=True)
class RowTerms:
    """kl_N is forward KL and ce_N cross-entropy with the targets, both at temperature 1, whatever the loss is."""

    loss_N: Tensor
    gradient_NV: Tensor
    kl_N: Tensor
    ce_N: Tensor
