"""Top-k teacher distributions: the k most likely tokens, and one bucket for all other tokens.

N rows (one per target), K most likely tokens per row, B = K + 1 buckets, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.distill.losses.divergences import Distribution, RowTerms, TokenObjective, row_dot


@dataclass(frozen=True)
class TopRows:
    """The teacher's K most likely tokens per row at temperature 1, the most likely first.

    `log_rest_N` is the logarithm of the total probability of the other tokens. It is finite because
    K is smaller than V.
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
    """Returns the loss and its gradient, with the divergence taken between buckets.

    The student's probabilities of the other tokens are summed into one bucket, as the teacher's
    are. A temperature T divides the log-probabilities of the buckets, after this sum.

    `kl_N` is a lower bound of the KL over the whole vocabulary. At T = 1 the same holds for every
    f-divergence, because merging tokens into a bucket cannot increase it. alpha_beta is not one, and
    logit_mse cannot be used here: it compares raw logits. Cross-entropy is over the full vocabulary.
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
    # The last bucket is the logsumexp of its logits. Their softmax therefore distributes its slope.
    gradient_NV = rest_NV.sub_(log_rest_N1).exp_().mul_(slope_NB[:, -1:])
    gradient_NV.scatter_(1, teacher.ids_NK, slope_NB[:, :-1])
    return objective.with_ce(loss_N, gradient_NV, kl_N, Distribution.of(student_NV), targets_N)
