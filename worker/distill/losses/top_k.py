"""Teachers kept as their k most likely tokens and one bucket for all the others.

N rows (completion positions), K tokens kept of a row, B = K + 1 buckets, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.distill.losses.divergences import Distribution, RowTerms, TokenObjective, row_dot


@dataclass(frozen=True)
class TopRows:
    """A teacher's rows at temperature 1: the likeliest token first, and the mass of the tokens left out.

    K is smaller than V, so that the rest has a mass and log_rest_N is finite.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    log_rest_N: Tensor

    def __getitem__(self, rows: slice) -> "TopRows":
        return TopRows(self.ids_NK[rows], self.log_p_NK[rows], self.log_rest_N[rows])

    def to(self, device: torch.device) -> "TopRows":
        return TopRows(self.ids_NK.to(device), self.log_p_NK.to(device), self.log_rest_N.to(device))


def bucket_terms(
    objective: TokenObjective, student_NV: Tensor, teacher: TopRows, targets_N: Tensor
) -> RowTerms:
    """Loss and gradient of the divergence between buckets, the student's rest summed up like the teacher's.

    A temperature T divides the buckets' log-probabilities, the rest being one bucket already. kl_N, and at T = 1
    every divergence but alpha_beta, is a lower bound of that over the whole vocabulary; cross-entropy is the usual one.
    """
    assert objective.matches == "token", "buckets have no ranks"
    rest_NV = student_NV.scatter(1, teacher.ids_NK, -torch.inf)
    log_rest_N1 = rest_NV.logsumexp(dim=-1, keepdim=True)
    student_NB = torch.cat([student_NV.gather(1, teacher.ids_NK), log_rest_N1], dim=1)
    teacher_NB = torch.cat([teacher.log_p_NK, teacher.log_rest_N[:, None]], dim=1).to(
        student_NV.dtype
    )
    q, p = Distribution.of(student_NB), Distribution.of(teacher_NB)
    loss_N, slope_NB = objective.tempered(student_NB, teacher_NB, q, p)
    kl_N = loss_N if objective.is_forward_kl else row_dot(p.p_NV, p.log_p_NV - q.log_p_NV)
    # the rest is the logsumexp of its logits, so its slope is shared out by their softmax
    gradient_NV = rest_NV.sub_(log_rest_N1).exp_().mul_(slope_NB[:, -1:])
    gradient_NV.scatter_(1, teacher.ids_NK, slope_NB[:, :-1])
    return objective.with_ce(loss_N, gradient_NV, kl_N, Distribution.of(student_NV), targets_N)
