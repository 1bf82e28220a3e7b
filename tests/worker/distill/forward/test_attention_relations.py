"""Queries, keys and values of every family against its own code, and relations against their plain formula."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import HEADS, WIDTH, save_tiny
from worker.distill.forward.attention_relations import (
    choose_relation_heads,
    relation_kl,
    self_attention,
)
from worker.distill.students.recipe import load_model
from worker.distill.training.feature_losses import Tap, Taps, layers_of
from worker.errors import UnsupportedModel
from worker.models.architectures import SUPPORTED, kind_of

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
OUTPUTS = (
    "attn.c_proj", "self_attention.dense", "attention.dense", "attention.output.dense", "layer.0.SelfAttention.o",
    "self_attn.o_proj", "self_attn.out_proj",
)  # fmt: skip


def tapped(
    model: Any, ids: Tensor = IDS
) -> tuple[Tensor, ...]:  # Any: transformers is untyped here
    attention = self_attention(layers_of(model, "decoder")[1], HEADS)
    tap = Tap(attention.modules)
    inputs = {"decoder_input_ids": ids} if kind_of(model.config) == "seq2seq" else {}
    with Taps([tap]), torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
    return attention.split(tap.outputs)


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_projections_tapped_are_those_that_decide_where_a_layer_looks(
    family: str, tmp_path: Path
) -> None:
    """Weights zeroed in one of the three leave the other two as they were, and zero just that one's first head."""
    model = load_model(save_tiny(tmp_path, family, num_layers=2))
    before = tapped(model)
    for number, (first, width) in enumerate(first_heads(model)):
        changed = copy.deepcopy(model)
        module = self_attention(layers_of(changed, "decoder")[1], HEADS).modules
        target: Any = module[number if len(module) == 3 else 0]  # Any: Conv1D is untyped
        with torch.no_grad():
            rows = slice(first, first + width)
            weight = target.weight
            (weight[:, rows] if type(target).__name__ == "Conv1D" else weight[rows]).zero_()
            if target.bias is not None:
                target.bias[rows] = 0.0
        after = tapped(changed)
        for other in range(3):
            expected = before[other].clone()
            if other == number:
                expected[..., :width] = 0.0
            assert torch.equal(after[other], expected)


def first_heads(model: Any) -> list[tuple[int, int]]:
    """Row and width of the first head's queries, keys and values in the weight, by each family's own layout."""
    size = WIDTH // HEADS
    if model.config.model_type == "gpt2":
        return [(0, size), (WIDTH, size), (2 * WIDTH, size)]
    if model.config.model_type in ("bloom", "gpt_neox"):
        return [(0, size), (size, size), (2 * size, size)]
    if model.config.model_type == "phi3":
        return [(0, size), (WIDTH, size), (WIDTH + 2 * size, size)]  # two heads of keys
    return [(0, size)] * 3


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_position_alone_puts_out_its_own_values(family: str, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path, family, num_layers=2))
    modules = dict(layers_of(model, "decoder")[1].named_modules())
    output = next(modules[name] for name in OUTPUTS if name in modules)
    seen: list[Tensor] = []
    output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    values = tapped(model, IDS[:, :1])[2]
    num_queries = WIDTH // values.shape[-1]  # that share a head of values
    expected = (
        values.view(1, 1, -1, 1, WIDTH // HEADS)
        .expand(-1, -1, -1, num_queries, -1)
        .reshape(1, 1, WIDTH)
    )
    torch.testing.assert_close(seen[0].reshape(1, 1, WIDTH), expected)


def test_relations_are_compared_as_the_plain_formula_says() -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 8, dtype=torch.float64)
    lengths = [5, 3]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    loss = relation_kl(student, teacher, mask, mask.flatten().nonzero()[:, 0], num_heads=4)
    (gradient,) = torch.autograd.grad(loss, student)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, length in enumerate(lengths):
        for a in range(4):
            q, p = (
                torch.softmax(
                    x[b, :length, w * a : w * a + w] @ x[b, :length, w * a : w * a + w].T / w**0.5,
                    -1,
                )
                for x, w in ((student, 3), (teacher, 2))
            )
            total = total + (p * (p / q).log()).sum()
            count += length
    (plain,) = torch.autograd.grad(total / count, student)
    torch.testing.assert_close(loss, total / count)
    torch.testing.assert_close(gradient, plain)
    assert gradient[1, 3:].abs().sum() == 0


@pytest.mark.parametrize(
    ("asked", "widths", "chosen"), [(None, {64, 96}, 4), (None, {64, 32}, 4), (16, {64, 32}, 16)]
)
def test_relation_heads_divide_every_width(
    asked: int | None, widths: set[int], chosen: int
) -> None:
    assert choose_relation_heads(asked, 12, widths) == chosen


def test_relation_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="divisor of 32"):
        choose_relation_heads(3, 4, {64, 32})
