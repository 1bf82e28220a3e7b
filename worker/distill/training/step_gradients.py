"""Gradient of a training step, summed over its micro-batches and over the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.distill.data_parallel import Ranks
from worker.distill.forward.hidden_states import autocast, hidden_rows_alone
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.lm_head import Head
from worker.distill.losses.uld import teacher_loss
from worker.distill.teachers.cached_teacher import CachedTeacher
from worker.distill.training.feature_losses import Features, Terms
from worker.distill.training.rollouts import MicroBatch
from worker.distill.training.tied_embedding import sparse_embedding_grad


@dataclass(frozen=True)
class StepStats:
    """Counts and metrics of a whole step.

    `values` has sums over targets, named like the arguments of MetricAverager.add, and the mean
    feature losses. `norm` is the norm of all gradients together.
    """

    num_targets: int
    num_tokens: int
    values: dict[str, float]
    norm: float


@dataclass(frozen=True)
class Gradients:
    """Computes gradients. `teacher` is None if its distribution is not used."""

    model: PreTrainedModel
    head: Head
    teacher: CachedTeacher | None
    features: Features | None
    autocast: torch.dtype | None
    ranks: Ranks

    def add(
        self,
        pieces: Sequence[MicroBatch],
        objective: TokenObjective,
        parameters: Sequence[nn.Parameter],
    ) -> StepStats:
        """Computes the gradient of the whole step, in the parameters of every rank.

        `pieces` are this rank's micro-batches, perhaps none. Every loss is divided by the targets
        of the whole step, so each token has the same weight in all micro-batches and ranks.

        The host waits for a GPU once, when it reads the statistics of all micro-batches.
        """
        counts = [
            sum(getattr(piece.batch, name) for piece in pieces)
            for name in ("num_targets", "num_tokens")
        ]
        num_targets, num_tokens = (int(count) for count in self.ranks.sum(*counts))
        compared: tuple[str, ...] = ()
        if self.teacher is None:
            compared = ("num_correct",)
        elif self._compares_tokens(objective):
            compared = ("kl_sum", "num_agreeing")
        names = ("loss_sum", *compared, *(self.features.names if self.features else ()))
        totals = torch.zeros(len(names), dtype=torch.float64, device=self.model.device)
        for piece in pieces:
            with sparse_embedding_grad(self.model, self.head.weight_VH):
                found = self._backward(piece, objective, num_targets)
            totals += torch.stack([found[name].double() for name in names])
        self.ranks.sum_gradients(parameters)
        norm = gradient_norm(parameters).to(totals)
        *own, norm_value = torch.cat([totals, norm[None]]).cpu().tolist()
        summed = self.ranks.sum(*own)
        values = dict(zip(names, summed, strict=True))
        return StepStats(num_targets, num_tokens, values, norm_value)

    def _backward(
        self, piece: MicroBatch, objective: TokenObjective, num_targets: int
    ) -> dict[str, Tensor]:
        """Adds the gradient of one micro-batch, and returns its statistics on the device.

        Its feature losses are means, so they are weighted by its share of the targets.
        """
        batch = piece.batch
        teacher = piece.teacher_rows(self.teacher) if self.teacher else None
        with autocast(batch.targets_N.device.type, self.autocast):
            hidden_NH, terms = self._read(piece)
        loss, stats = teacher_loss(
            hidden_NH.to(self.head.weight_VH.dtype),
            self.head,
            batch.targets_N,
            teacher,
            objective,
            denominator=num_targets,
        )
        values = {"loss_sum": stats.sums[0]}
        if teacher is None:
            values["num_correct"] = stats.sums[3]
        elif self._compares_tokens(objective):
            values |= {"kl_sum": stats.sums[1], "num_agreeing": stats.sums[3]}
        if terms is not None:
            share = batch.num_targets / num_targets
            loss = loss + terms.loss * share
            values |= {name: value.double() * share for name, value in terms.values.items()}
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return values

    def _compares_tokens(self, objective: TokenObjective) -> bool:
        """Returns whether there is a KL to report.

        It needs the teacher's distribution, over the same vocabulary as the student's.
        """
        return self.teacher is not None and objective.matches == "token"

    def _read(self, piece: MicroBatch) -> tuple[Tensor, Terms | None]:
        """Returns the LM head's inputs, and the feature losses if there are any."""
        if self.features:
            return self.features.read(piece.batch, piece.rollouts)
        return hidden_rows_alone(self.model, piece.batch), None


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Returns the norm of all gradients together, on their device."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clipped_step(optimizer: torch.optim.Optimizer, norm: float, max_norm: float) -> None:
    """Runs a step of a fused optimizer that clips the gradients of norm `norm` to `max_norm`.

    The optimizer scales the gradients itself. Clipping them first would be another pass over all of
    them.
    """
    scale = None
    if norm > max_norm:  # created on the device: a copy would wait for it
        device = optimizer.param_groups[0]["params"][0].device
        scale = torch.full((), norm / max_norm, dtype=torch.float32, device=device)
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.step()
