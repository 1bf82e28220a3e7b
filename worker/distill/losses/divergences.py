"""Token-level divergences between a teacher p and a student q, each with its exact gradient.

N rows (one per target), V vocabulary, U the teacher's vocabulary if it differs. z are raw logits,
T is the temperature, q = softmax(z_student / T).

Every divergence D(p, q) has the gradient dD/dz = (1/T) q*(g - <q, g>) with g = dD/dq, so autograd
is not needed. Each function returns D per row and its slope q*(g - <q, g>). KL and Jensen-Shannon
divergences are in nats. Value and slope are finite in float32 for finite logits, because ratios are
differences of logarithms. The exception is logit_mse, which compares the logits themselves and has
no temperature.

Tests compare all gradients with autograd and finite differences.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from app.contracts.distillation import DivergenceName, Objective, Phase


@dataclass(frozen=True)
class Distribution:
    """Softmax of rows of logits, and its logarithm.

    Both are kept because the divergences need both and the exponentials are the expensive part.
    """

    p_NV: Tensor
    log_p_NV: Tensor

    @classmethod
    def of(cls, z_NV: Tensor) -> "Distribution":
        log_p_NV = z_NV - z_NV.amax(dim=-1, keepdim=True)
        p_NV = log_p_NV.exp()
        total_N1 = p_NV.sum(dim=-1, keepdim=True)
        return cls(p_NV.div_(total_N1), log_p_NV.sub_(total_N1.log()))

    def mixed(self, other: "Distribution", share: float) -> Tensor:
        """Returns log(share * p + (1 - share) * other).

        It is finite even where both probabilities are 0: the sum is at least the smallest normal
        number of the dtype.
        """
        m_NV = torch.lerp(other.p_NV, self.p_NV, share)
        return m_NV.clamp_(min=torch.finfo(m_NV.dtype).tiny).log_()


def forward_kl(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    """Returns KL(p || q), which makes the student cover all modes of the teacher.

    g = -p/q, so the slope is q - p.
    """
    return row_dot(p.p_NV, p.log_p_NV - q.log_p_NV), q.p_NV - p.p_NV


def reverse_kl(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    """Returns KL(q || p), which makes the student avoid what the teacher finds unlikely.

    g = log(q/p).
    """
    ratio_NV = q.log_p_NV - p.log_p_NV
    loss_N = row_dot(q.p_NV, ratio_NV)
    return loss_N, ratio_NV.sub_(loss_N[:, None]).mul_(q.p_NV)


def jensen_shannon(q: Distribution, p: Distribution, *, beta: float) -> tuple[Tensor, Tensor]:
    """Returns beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    g = (1 - beta) log(q/m). Source: Agarwal et al., arXiv:2306.13649.
    """
    log_m_NV = p.mixed(q, beta)
    p_part_N = row_dot(p.p_NV, p.log_p_NV - log_m_NV)
    ratio_NV = torch.sub(q.log_p_NV, log_m_NV, out=log_m_NV)
    q_part_N = row_dot(q.p_NV, ratio_NV)
    slope_NV = ratio_NV.sub_(q_part_N[:, None]).mul_(q.p_NV).mul_(1 - beta)
    return beta * p_part_N + (1 - beta) * q_part_N, slope_NV


def skew_forward_kl(q: Distribution, p: Distribution, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Returns KL(p || m) with m = alpha p + (1 - alpha) q. It is at most log(1/alpha).

    g = -(1 - alpha) p/m. Source: Ko et al. (DistiLLM), arXiv:2402.03898.
    """
    ratio_NV = torch.sub(p.log_p_NV, p.mixed(q, alpha))
    loss_N = row_dot(p.p_NV, ratio_NV)
    g_NV = ratio_NV.exp_().mul_(alpha - 1)  # p/m is at most 1/alpha
    return loss_N, g_NV.sub_(row_dot(q.p_NV, g_NV)[:, None]).mul_(q.p_NV)


def skew_reverse_kl(q: Distribution, p: Distribution, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Returns KL(q || m) with m = (1 - alpha) p + alpha q. It is at most log(1/alpha).

    g = log(q/m) - alpha q/m: the q in m is differentiated too.
    Source: Ko et al. (DistiLLM), arXiv:2402.03898.
    """
    ratio_NV = torch.sub(q.log_p_NV, q.mixed(p, alpha))
    loss_N = row_dot(q.p_NV, ratio_NV)
    g_NV = ratio_NV.sub_(ratio_NV.exp(), alpha=alpha)  # q/m is at most 1/alpha
    return loss_N, g_NV.sub_(row_dot(q.p_NV, g_NV)[:, None]).mul_(q.p_NV)


def total_variation(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    """Returns the total variation distance sum |q - p| / 2. It is at most 1.

    g = sign(q - p) / 2.
    """
    difference_NV = q.p_NV - p.p_NV
    loss_N = difference_NV.abs().sum(dim=-1) / 2
    g_NV = difference_NV.sign_().div_(2)
    return loss_N, g_NV.sub_(row_dot(q.p_NV, g_NV)[:, None]).mul_(q.p_NV)


def squared_hellinger(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    """Returns the squared Hellinger distance sum (sqrt(q) - sqrt(p))^2 / 2. It is at most 1.

    g = (1 - sqrt(p/q)) / 2, so <q, g> is half the distance. The slope is computed from
    q g = sqrt(q) (sqrt(q) - sqrt(p)) / 2, which is bounded even where g is not.
    """
    root_q_NV = q.p_NV.sqrt()
    difference_NV = root_q_NV - p.p_NV.sqrt()
    loss_N = row_dot(difference_NV, difference_NV) / 2
    slope_NV = difference_NV.mul_(root_q_NV).sub_(q.p_NV * loss_N[:, None]).div_(2)
    return loss_N, slope_NV


def alpha_beta(
    q: Distribution, p: Distribution, *, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Returns the alpha-beta divergence, with s = alpha + beta.

    D = -1/(alpha beta) sum [p^alpha q^beta - alpha/s p^s - beta/s q^s]. The slope is computed from
    q g = (q^s - p^alpha q^beta) / alpha, which is bounded even where g is not.
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
    """Returns the sum over ranks i of |i-th largest q - i-th largest p|. It is at most 2.

    It compares distributions over different vocabularies. The smaller one is padded with zeros.
    g is the sign of each difference, in the order of the student's vocabulary.
    Source: Boizard et al. (ULD), arXiv:2402.12030.
    """
    sorted_q_NV, order_NV = q_NV.sort(dim=-1, descending=True)
    sorted_p_NU = p_NU.sort(dim=-1, descending=True).values
    num_shared = min(sorted_q_NV.shape[1], sorted_p_NU.shape[1])
    difference_NV = sorted_q_NV  # tokens without a partner are compared with zero
    difference_NV[:, :num_shared] -= sorted_p_NU[:, :num_shared]
    loss_N = difference_NV.abs().sum(dim=-1) + sorted_p_NU[:, num_shared:].sum(dim=-1)
    g_NV = torch.empty_like(q_NV).scatter_(1, order_NV, difference_NV.sign_())
    return loss_N, g_NV.sub_(row_dot(q_NV, g_NV)[:, None]).mul_(q_NV)


def logit_mse(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean squared difference of raw logits over the vocabulary, and its gradient.

    There is no softmax and no temperature. Unlike the divergences, it depends on a constant added
    to all logits.
    """
    difference_NV = student_NV - teacher_NV
    loss_N = row_dot(difference_NV, difference_NV) / student_NV.shape[1]
    return loss_N, difference_NV.mul_(2 / student_NV.shape[1])


def row_dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """Returns the inner product of each pair of rows."""
    product_N: Tensor = torch.linalg.vecdot(a_NV, b_NV)
    return product_N


@dataclass(frozen=True)
class TokenObjective:
    """Loss per row: (1 - ce_weight) T² D(p, q) + ce_weight CE(target). logit_mse ignores T.

    With `matches` = "token", D is `divergence` and compares the probabilities of the same token.
    With "rank", D is sorted_l1 and compares sorted probabilities; the vocabularies may differ.
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
        """Returns the objective after the given share of the training steps.

        `phase`, if given, replaces the divergence, alpha and beta. `ce_weight`, the teacher signal
        and the temperature schedule stay those of `objective`.
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
        """True if D is forward KL at temperature 1, so that its value is also the reported KL."""
        return (
            self.divergence == "forward_kl" and self.matches == "token" and self.temperature == 1.0
        )

    @property
    def is_jensen_shannon(self) -> bool:
        """True if D is the Jensen-Shannon divergence at temperature 1."""
        return self.divergence == "jsd" and self.matches == "token" and self.temperature == 1.0

    def measure(self, q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
        """Returns D per row and its slope, without the factors T², 1/T and ce_weight."""
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
            case "hellinger":
                return squared_hellinger(q, p)
            case "alpha_beta":
                return alpha_beta(q, p, alpha=self.alpha, beta=self.beta)
            case "logit_mse":
                raise AssertionError("logit_mse needs logits, not log-probabilities")

    def tempered(
        self, student_NV: Tensor, teacher_NV: Tensor, q: Distribution, p: Distribution
    ) -> tuple[Tensor, Tensor]:
        """Returns T² D per row at temperature T, and its gradient in `student_NV`.

        The inputs are logits or log-probabilities. `q` and `p` are their softmaxes at T = 1.
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
        """Returns loss, gradient in the student's raw logits, KL and cross-entropy per row."""
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
        """Returns the terms of D mixed with cross-entropy. Overwrites `q` and `gradient_NV`."""
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
    """Loss, gradient, forward KL and cross-entropy with the targets, per row.

    KL and cross-entropy are at temperature 1, independent of the objective. `kl_N` is 0 if ranks
    are matched, because KL is not defined between different vocabularies.
    """

    loss_N: Tensor
    gradient_NV: Tensor
    kl_N: Tensor
    ce_N: Tensor


def temperature_at(objective: Objective, share: float) -> float:
    """Returns the temperature after the given share of the training steps.

    It is constant unless the objective has a `temperature_end`.
    """
    start, end = objective.temperature, objective.temperature_end
    if end is None:
        return start
    done = (
        share if objective.temperature_schedule == "linear" else (1 - math.cos(math.pi * share)) / 2
    )
    return start + (end - start) * done
