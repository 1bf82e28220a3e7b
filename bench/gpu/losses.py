"""The fused loss against the plain one and, where it is installed, against Liger's chunked loss."""

import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from app.contracts.distillation import Objective
from bench.gpu.memory import peak_bytes, reset_peak, synchronize
from bench.gpu.models import Json
from bench.gpu.sizes import Sizes
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import fused_distillation_loss
from worker.distill.losses.lm_head import Head, TeacherRows

# N rows, V tokens, H hidden size (of the student or the teacher)
NUM_WARM, NUM_TIMED = 2, 5
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def measure_losses(sizes: Sizes, device: str) -> Json:
    """Returns time, peak memory and value of the Jensen-Shannon loss and its gradients, in float32.

    `entries` names the implementations. `not_compared` has the reasons why some are left out.
    """
    losses: dict[str, Loss] = {"fused": fused, "plain": plain}
    reasons = []
    if find_spec("liger_kernel") is None:
        reasons.append("liger-kernel is not installed")
    else:
        losses["liger"] = liger
    entries = {name: measure_loss(loss, sizes, device) for name, loss in losses.items()}
    return {"entries": entries, "not_compared": reasons}


def measure_loss(loss: Loss, sizes: Sizes, device: str) -> Json:
    """Returns the figures of one implementation, forward and backward, with a trained head."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        """Returns values for which logits have a standard deviation of about 1."""
        values = torch.randn(*shape, device=device, generator=generator)
        return values.div(shape[-1] ** 0.25)

    vocab, rows = sizes.vocab_size, sizes.loss_rows
    student_NH = random(rows, sizes.student.hidden_size).requires_grad_()
    head_VH = random(vocab, sizes.student.hidden_size).requires_grad_()
    teacher_NH = random(rows, sizes.teacher.hidden_size)
    teacher_VH = random(vocab, sizes.teacher.hidden_size)
    targets_N = torch.randint(vocab, (rows,), device=device, generator=generator)

    def run() -> Tensor:
        """Computes the loss and its gradients once."""
        student_NH.grad = head_VH.grad = None
        value = loss(student_NH, head_VH, teacher_NH, teacher_VH, targets_N)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return value.detach()

    for _ in range(NUM_WARM):
        value = run()
    synchronize(device)
    reset_peak(device)
    begun = time.perf_counter()
    for _ in range(NUM_TIMED):
        value = run()
    synchronize(device)
    seconds = (time.perf_counter() - begun) / NUM_TIMED
    gradient = student_NH.grad
    assert gradient is not None
    return {
        "ms": round(1000 * seconds, 3),
        "peak_bytes": peak_bytes(device),
        "loss": float(value),
        "gradient_norm": float(gradient.norm()),
    }


def fused(
    student_NH: Tensor, head_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor, targets_N: Tensor
) -> Tensor:
    """The loss of the trainer."""
    teacher = TeacherRows(Head(teacher_VH), hidden_NH=teacher_NH)
    objective = TokenObjective.from_objective(Objective(divergence="jsd"))
    loss, _ = fused_distillation_loss(
        student_NH, Head(head_VH), targets_N, teacher, objective, denominator=len(targets_N)
    )
    return loss


def plain(
    student_NH: Tensor, head_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor, targets_N: Tensor
) -> Tensor:
    """The same with all logits in memory at once."""
    student_NV = (student_NH @ head_VH.t()).log_softmax(dim=-1)
    teacher_NV = (teacher_NH @ teacher_VH.t()).log_softmax(dim=-1)
    mean_NV = (0.5 * (student_NV.exp() + teacher_NV.exp())).log()
    divergence = torch.nn.functional.kl_div
    parts = [
        divergence(mean_NV, log_NV, reduction="sum", log_target=True)
        for log_NV in (student_NV, teacher_NV)
    ]
    return 0.5 * (parts[0] + parts[1]) / len(targets_N)


def liger(
    student_NH: Tensor, head_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor, targets_N: Tensor
) -> Tensor:
    """Liger's chunked loss without its cross-entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    found: Tensor = loss(
        student_NH,
        head_VH,
        teacher_NH,
        teacher_VH,
        targets_N,
        student_bias=None,
        teacher_bias=None,
    )
    return found
