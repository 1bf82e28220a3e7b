"""Gradient of a training step, summed over its micro-batches and over the ranks."""

import math
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
from worker.host_copies import HostCopy


@dataclass(frozen=True)
class StepStats:
    """Counts and metrics of a whole step.

    `sums` has sums over targets, named like the arguments of MetricAverager.add, and the mean
    feature losses. The first one is `loss_sum`. `norm` is the norm of all gradients together.
    Both are on the device.
    """

    num_targets: int
    num_tokens: int
    names: tuple[str, ...]
    sums: Tensor
    norm: Tensor
    copy: HostCopy

    @classmethod
    def of(
        cls, num_targets: int, num_tokens: int, names: tuple[str, ...], sums: Tensor, norm: Tensor
    ) -> "StepStats":
        """Begins to copy the sums and the norm to the CPU, so that they can be read later."""
        copy = HostCopy.of(torch.cat([sums, norm[None]]))
        return cls(num_targets, num_tokens, names, sums, norm, copy)

    def read(self) -> tuple[dict[str, float], float]:
        """Returns the sums and the norm. The host waits until a GPU has computed the step."""
        *values, norm = self.copy.read().tolist()
        return dict(zip(self.names, values, strict=True)), norm


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

        The host does not wait for a GPU. It waits when it reads the statistics.
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
        totals = self.ranks.sum_tensor(totals)
        return StepStats.of(num_targets, num_tokens, names, totals, norm)

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


def clipped_step(optimizer: torch.optim.Optimizer, stats: StepStats, max_norm: float) -> None:
    """Runs a step of a fused optimizer that clips the gradients to the norm `max_norm`.

    Nothing changes if the loss or the norm is not finite. The optimizer scales the gradients
    itself. Clipping them first would be another pass over all of them.
    """
    scale: Tensor | None = None  # the optimizer is faster without
    found_inf: Tensor | None = None
    if is_known(stats.norm):
        values, norm = stats.read()
        if not (math.isfinite(values["loss_sum"]) and math.isfinite(norm)):
            return
        if norm > max_norm:
            scale = torch.tensor(norm / max_norm, dtype=torch.float32)
    else:
        scale = (stats.norm / max_norm).clamp(min=1.0).float()
        found_inf = (~torch.isfinite(stats.sums[0] + stats.norm)).float()
    optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # type: ignore[attr-defined]
    optimizer.step()


def is_known(tensor: Tensor) -> bool:
    """Returns whether the host can read a tensor without waiting for a GPU."""
    return tensor.device.type == "cpu"
