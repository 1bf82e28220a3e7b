"""Token-level divergences between a teacher p and a student q, each with its exact gradient.

N rows (completion positions), V vocabulary (U the teacher's, where it has another); z are raw logits, T is the
temperature, q = softmax(z_student / T).
Every divergence D(p, q) has dD/dz = (1/T) q*(g - <q, g>) with g = dD/dq, so no autograd is needed. A divergence
here returns D a row, in nats, and its slope q*(g - <q, g>); both stay finite in float32 for finite logits,
because ratios are taken between logarithms (what underflows has no weight). Only logit_mse is of the logits themselves, without a temperature.
All are checked against autograd and finite differences.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from app.contracts.distillation import DivergenceName, Objective, Phase


@dataclass(frozen=True)
class Distribution:
    """Softmax of rows of logits, with its logarithm: a divergence wants both, and the exponentials are what costs."""

    p_NV: Tensor
    log_p_NV: Tensor

    @classmethod
    def of(cls, z_NV: Tensor) -> "Distribution":
        log_p_NV = z_NV - z_NV.amax(dim=-1, keepdim=True)
        p_NV = log_p_NV.exp()
        total_N1 = p_NV.sum(dim=-1, keepdim=True)
        return cls(p_NV.div_(total_N1), log_p_NV.sub_(total_N1.log()))

    def mixed(self, other: "Distribution", share: float) -> Tensor:
        """log(share p + (1 - share) other's); where both are too small to tell from 0, a finite number below them."""
        m_NV = torch.lerp(other.p_NV, self.p_NV, share)
        return m_NV.clamp_(min=torch.finfo(m_NV.dtype).tiny).log_()


def forward_kl(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    """KL(p || q): the student covers everything the teacher says. Slope q - p."""
    return row_dot(p.p_NV, p.log_p_NV - q.log_p_NV), q.p_NV - p.p_NV


def reverse_kl(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    """KL(q || p): the student keeps to what the teacher finds likely. g = log(q/p)."""
    ratio_NV = q.log_p_NV - p.log_p_NV
    loss_N = row_dot(q.p_NV, ratio_NV)
    return loss_N, ratio_NV.sub_(loss_N[:, None]).mul_(q.p_NV)


def jensen_shannon(q: Distribution, p: Distribution, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. g = (1 - beta) log(q/m).

    Source: Agarwal et al., arXiv:2306.13649.
    """
    log_m_NV = p.mixed(q, beta)
    p_part_N = row_dot(p.p_NV, p.log_p_NV - log_m_NV)
    ratio_NV = torch.sub(q.log_p_NV, log_m_NV, out=log_m_NV)
    q_part_N = row_dot(q.p_NV, ratio_NV)
    slope_NV = ratio_NV.sub_(q_part_N[:, None]).mul_(q.p_NV).mul_(1 - beta)
    return beta * p_part_N + (1 - beta) * q_part_N, slope_NV


def skew_forward_kl(q: Distribution, p: Distribution, *, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(p || m) with m = alpha p + (1 - alpha) q, at most log(1/alpha). g = -(1 - alpha) p/m.

    Source: Ko et al. (DistiLLM), arXiv:2402.03898.
    """
    ratio_NV = torch.sub(p.log_p_NV, p.mixed(q, alpha))
    loss_N = row_dot(p.p_NV, ratio_NV)
    g_NV = ratio_NV.exp_().mul_(alpha - 1)  # p/m is at most 1/alpha
    return loss_N, g_NV.sub_(row_dot(q.p_NV, g_NV)[:, None]).mul_(q.p_NV)


def skew_reverse_kl(q: Distribution, p: Distribution, *, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(q || m) with m = (1 - alpha) p + alpha q, at most log(1/alpha). g = log(q/m) - alpha q/m.

    The q within m is differentiated too. Source: Ko et al. (DistiLLM), arXiv:2402.03898.
    """
    ratio_NV = torch.sub(q.log_p_NV, q.mixed(p, alpha))
    loss_N = row_dot(q.p_NV, ratio_NV)
    g_NV = ratio_NV.sub_(ratio_NV.exp(), alpha=alpha)  # q/m is at most 1/alpha
    return loss_N, g_NV.sub_(row_dot(q.p_NV, g_NV)[:, None]).mul_(q.p_NV)


def total_variation(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    """Half of sum |q - p|, at most 1. g = sign(q - p) / 2."""
    difference_NV = q.p_NV - p.p_NV
    loss_N = difference_NV.abs().sum(dim=-1) / 2
    g_NV = difference_NV.sign_().div_(2)
    return loss_N, g_NV.sub_(row_dot(q.p_NV, g_NV)[:, None]).mul_(q.p_NV)


def alpha_beta(
    q: Distribution, p: Distribution, *, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """-1/(alpha beta) sum [p^alpha q^beta - alpha/s p^s - beta/s q^s] with s = alpha + beta.

    q g = (q^s - p^alpha q^beta) / alpha, which is bounded where g itself is not.
    Source: Wang et al. (ABKD), arXiv:2505.04560.
    """
    s = alpha + beta
    mixed_NV = torch.add(p.log_p_NV * alpha, q.log_p_NV, alpha=beta).exp_()
    p_part_N = (p.log_p_NV * s).exp_().sub_(mixed_NV).sum(dim=-1)
    weighted_g_NV = (q.log_p_NV * s).exp_().sub_(mixed_NV).div_(alpha)
    mean_g_N = weighted_g_NV.sum(dim=-1)
    loss_N = (p_part_N / beta + mean_g_N) / s
    return loss_N, weighted_g_NV.sub_(q.p_NV * mean_g_N[:, None])


def sorted_l1(q_NV: Tensor, p_NU: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of |i-th largest q - i-th largest p|, the smaller vocabulary filled up with zeros; at most 2.

    It compares distributions over different vocabularies, by rank. g = sign(q - p) in the student's order.
    Source: Boizard et al. (ULD), arXiv:2402.12030.
    """
    sorted_q_NV, order_NV = q_NV.sort(dim=-1, descending=True)
    sorted_p_NU = p_NU.sort(dim=-1, descending=True).values
    num_shared = min(sorted_q_NV.shape[1], sorted_p_NU.shape[1])
    difference_NV = sorted_q_NV  # what has no partner faces zero
    difference_NV[:, :num_shared] -= sorted_p_NU[:, :num_shared]
    loss_N = difference_NV.abs().sum(dim=-1) + sorted_p_NU[:, num_shared:].sum(dim=-1)
    g_NV = torch.empty_like(q_NV).scatter_(1, order_NV, difference_NV.sign_())
    return loss_N, g_NV.sub_(row_dot(q_NV, g_NV)[:, None]).mul_(q_NV)


def logit_mse(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the vocabulary of the squared differences of raw logits, and its gradient in the student's.

    No softmax and no temperature: unlike the divergences it also compares the logits' common shift, and it reads
    raw logits where they read log-probabilities.
    """
    difference_NV = student_NV - teacher_NV
    loss_N = row_dot(difference_NV, difference_NV) / student_NV.shape[1]
    return loss_N, difference_NV.mul_(2 / student_NV.shape[1])


def row_dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """Inner product of each pair of rows."""
    product_N: Tensor = torch.linalg.vecdot(a_NV, b_NV)
    return product_N


@dataclass(frozen=True)
class TokenObjective:
    """(1 - ce_weight) T² D(p, q) + ce_weight CE(target), a row; logit_mse knows no T.

    matches: what is compared with what. token: the same token's probabilities, by `divergence`; rank: the sorted
    probabilities, whatever the vocabularies (sorted_l1, in place of `divergence`).
    """

    divergence: DivergenceName = "forward_kl"
    alpha: float = 0.1
    beta: float = 0.5
    temperature: float = 1.0
    ce_weight: float = 0.0
    matches: Literal["token", "rank"] = "token"

    @classmethod
    def from_objective(
        cls, objective: Objective, phase: Phase | None = None, share: float = 0.0
    ) -> "TokenObjective":
        """The objective when `share` of the training's steps are done, in the first phase or in `phase`.

        A phase keeps ce_weight, the teacher's signal and the course of the temperature.
        """
        chosen = phase or objective
        alpha, beta = (0.2, 0.7) if chosen.divergence == "alpha_beta" else (0.1, 0.5)
        return cls(
            divergence=chosen.divergence,
            alpha=alpha if chosen.alpha is None else chosen.alpha,
            beta=beta if chosen.beta is None else chosen.beta,
            temperature=temperature_at(objective, share),
            ce_weight=objective.ce_weight,
            matches="rank" if objective.teacher_signal == "uld" else "token",
        )

    @property
    def is_forward_kl(self) -> bool:
        """Plain forward KL at temperature 1, whose value is also the reported KL."""
        return (
            self.divergence == "forward_kl" and self.matches == "token" and self.temperature == 1.0
        )

    @property
    def is_jensen_shannon(self) -> bool:
        """Plain Jensen-Shannon divergence at temperature 1."""
        return self.divergence == "jsd" and self.matches == "token" and self.temperature == 1.0

    def measure(self, q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
        """The divergence and its slope, before T², the gradient's 1/T and the weights."""
        if self.matches == "rank":
            return sorted_l1(q.p_NV, p.p_NV)
        match self.divergence:
            case "forward_kl":
                return forward_kl(q, p)
            case "reverse_kl":
                return reverse_kl(q, p)
            case "jsd":
                return jensen_shannon(q, p, beta=self.beta)
            case "skew_forward_kl":
                return skew_forward_kl(q, p, alpha=self.alpha)
            case "skew_reverse_kl":
                return skew_reverse_kl(q, p, alpha=self.alpha)
            case "tvd":
                return total_variation(q, p)
            case "alpha_beta":
                return alpha_beta(q, p, alpha=self.alpha, beta=self.beta)
            case "logit_mse":
                raise AssertionError("logit_mse is of logits, not of log-probabilities")

    def tempered(
        self, student_NV: Tensor, teacher_NV: Tensor, q: Distribution, p: Distribution
    ) -> tuple[Tensor, Tensor]:
        """T² times the divergence of (log-)logits divided by T, and its gradient in the student's.

        q and p are their softmaxes at temperature 1.
        """
        t = self.temperature
        if t == 1.0:
            return self.measure(q, p)
        loss_N, slope_NV = self.measure(
            Distribution.of(student_NV / t), Distribution.of(teacher_NV / t)
        )
        return loss_N * t**2, slope_NV.mul_(t)  # T² times the gradient's 1/T

    def loss_and_gradient(
        self, student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor
    ) -> "RowTerms":
        """Loss of each row and its gradient in the student's raw logits, with what evaluation wants to know."""
        q, p = Distribution.of(student_NV), Distribution.of(teacher_NV)
        if self.divergence == "logit_mse" and self.matches == "token":
            loss_N, gradient_NV = logit_mse(student_NV, teacher_NV)
        else:
            loss_N, gradient_NV = self.tempered(student_NV, teacher_NV, q, p)
        if self.is_forward_kl:
            kl_N = loss_N
        elif self.matches == "rank":
            kl_N = torch.zeros_like(loss_N)
        else:
            kl_N = row_dot(p.p_NV, p.log_p_NV - q.log_p_NV)
        return self.with_ce(loss_N, gradient_NV, kl_N, q, targets_N)

    def with_ce(
        self, loss_N: Tensor, gradient_NV: Tensor, kl_N: Tensor, q: Distribution, targets_N: Tensor
    ) -> "RowTerms":
        """The divergence's terms mixed with cross-entropy's; q is used up."""
        ce_N = -q.log_p_NV.gather(1, targets_N[:, None])[:, 0]
        if self.ce_weight:
            loss_N = torch.lerp(loss_N, ce_N, self.ce_weight)
            ce_gradient_NV = q.p_NV
            ce_gradient_NV.scatter_add_(
                1, targets_N[:, None], ce_gradient_NV.new_full((len(targets_N), 1), -1.0)
            )
            gradient_NV = gradient_NV.lerp_(ce_gradient_NV, self.ce_weight)
        return RowTerms(loss_N=loss_N, gradient_NV=gradient_NV, kl_N=kl_N, ce_N=ce_N)


@dataclass(frozen=True)
class RowTerms:
    """kl_N is forward KL and ce_N cross-entropy with the targets, both at temperature 1, whatever the loss is.

    Between different vocabularies there is no KL; kl_N is 0 then.
    """

    loss_N: Tensor
    gradient_NV: Tensor
    kl_N: Tensor
    ce_N: Tensor


def temperature_at(objective: Objective, share: float) -> float:
    """The temperature when `share` of the training's steps are done; it moves only if it has an end."""
    start, end = objective.temperature, objective.temperature_end
    if end is None:
        return start
    done = (
        share if objective.temperature_schedule == "linear" else (1 - math.cos(math.pi * share)) / 2
    )
    return start + (end - start) * done
