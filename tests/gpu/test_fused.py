from typing import get_args

import pytest
import torch

from app.contracts.distillation import DivergenceName, Objective
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import fused_distillation_loss
from worker.distill.losses.lm_head import Head, TeacherRows, expected_rows

pytestmark = pytest.mark.gpu
N, H, V = 300, 64, 1000  # several chunks


def loss_and_gradients(
    objective: TokenObjective, device: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    weight_VH, hidden_NH = random(V, H).requires_grad_(), random(N, H).requires_grad_()
    teacher = TeacherRows(Head(random(V, H)), hidden_NH=random(N, H))
    targets_N = torch.arange(N, device=device)
    loss, _ = fused_distillation_loss(
        hidden_NH, Head(weight_VH), targets_N, teacher, objective, denominator=N, chunk_rows=128
    )
    loss.backward()
    assert hidden_NH.grad is not None
    assert weight_VH.grad is not None
    return [loss.detach().cpu(), hidden_NH.grad.cpu(), weight_VH.grad.cpu()]


@pytest.mark.parametrize("divergence", get_args(DivergenceName))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_card_gives_the_loss_and_gradients_of_a_cpu(
    divergence: DivergenceName, temperature: float
) -> None:
    asked = Objective(divergence=divergence, temperature=temperature, ce_weight=0.3)
    objective = TokenObjective.from_objective(asked)
    exact = loss_and_gradients(objective, "cpu", torch.float64)
    on_card = loss_and_gradients(objective, "cuda", torch.float32)
    for ours, theirs in zip(on_card, exact, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())
        )


def test_expected_rows_of_a_card_are_those_of_a_cpu() -> None:
    torch.manual_seed(0)
    head, hidden_NH = Head(torch.randn(V, H)), torch.randn(N, H)
    on_cpu = expected_rows(hidden_NH, head)
    on_card = expected_rows(hidden_NH.cuda(), Head(head.weight_VH.cuda()))
    torch.testing.assert_close(on_card.head_NH.cpu(), on_cpu.head_NH, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        on_card.neg_entropy_N.cpu(), on_cpu.neg_entropy_N, rtol=1e-3, atol=1e-3
    )
    assert torch.equal(on_card.top_N.cpu(), on_cpu.top_N)
