"""Gradients of a head and its embedding gathered in one matrix, against autograd's."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import save_tiny
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import hidden_rows
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import fused_distillation_loss
from worker.distill.losses.lm_head import head_of
from worker.distill.students.recipe import load_model
from worker.distill.training.tied_embedding import sparse_embedding_grad
from worker.models.architectures import CAUSAL, SEQ2SEQ

ROWS = [(4, 30, 31, 30, 33, 30), (4, 40, 41), (4, 50, 51, 52)]
SOURCE = (5, 30, 7, 40)


def gradients_of(
    folder: Path, family: str, *, gathers: bool, uses_head: bool = True
) -> dict[str, Tensor]:
    model = load_model(folder)
    head = head_of(model)
    source = SOURCE if family in SEQ2SEQ else ()
    examples = [Example(row, ((1, len(row)),), source_ids=source) for row in ROWS]
    for numbers in ([0, 1], [2]):  # the second adds to what the first left
        batch = collate(examples, numbers)
        with sparse_embedding_grad(model, head.weight_VH) if gathers else nullcontext():
            hidden_NH = hidden_rows(model, batch)
            loss = hidden_NH.square().sum()
            if uses_head:
                loss = loss + fused_distillation_loss(
                    hidden_NH, head, batch.targets_N, None, TokenObjective(ce_weight=1.0), denominator=7
                )[0]  # fmt: skip
            loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", sorted((*CAUSAL, *SEQ2SEQ)))
def test_the_gradient_is_the_one_of_autograd(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family, num_layers=1)
    gathered = gradients_of(folder, family, gathers=True)
    plain = gradients_of(folder, family, gathers=False)
    assert gathered.keys() == plain.keys()
    for name, gradient in plain.items():
        # float32 sums in another order
        torch.testing.assert_close(
            gathered[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())
        )


def test_without_the_head_there_are_the_rows_alone(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", num_layers=1)
    gathered = gradients_of(folder, "llama", gathers=True, uses_head=False)
    plain = gradients_of(folder, "llama", gathers=False, uses_head=False)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(gathered[name], plain[name], rtol=1e-5, atol=1e-5)
    assert gathered[name].any(dim=1).sum() < len(gathered[name]) / 2


def test_autograd_makes_no_matrix_of_the_embedding_alone(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path, "llama", num_layers=1))
    head = head_of(model)
    batch = collate([Example(ROWS[0], ((1, 6),))], [0])
    watched = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with watched, sparse_embedding_grad(model, head.weight_VH):
        hidden_NH = hidden_rows(model, batch)
        loss, _ = fused_distillation_loss(
            hidden_NH, head, batch.targets_N, None, TokenObjective(ce_weight=1.0), denominator=5
        )
        loss.backward()
    assert "aten::embedding_dense_backward" not in {event.key for event in watched.key_averages()}
