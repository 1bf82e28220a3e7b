"""A packed batch against the padded one: the head's inputs, every gradient, and where packing is left alone."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny import save_tiny
from worker.cpu.short_attention import use_short_attention
from worker.distill.data.batching import Batch, collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import hidden_rows, hidden_rows_alone
from worker.distill.forward.packing import LEAST_SAVED, packing_of
from worker.distill.students.recipe import load_model
from worker.models.architectures import CAUSAL

SYSTEM = (4, 5, 6, 7, 8, 9)
ALIKE = [(*SYSTEM, 30, 31, 32, 33, 34, 35, 36), (*SYSTEM, 30, 41), (*SYSTEM, 50, 51, 52)]
UNLIKE = [(4, 30, 31, 32, 33, 34, 35), (5, 40, 41), (6, 50, 51, 52)]
PACKED = sorted(set(CAUSAL) - {"bloom"})


def batch_of(rows: list[tuple[int, ...]], num_prompt: int) -> Batch:
    examples = [Example(row, ((num_prompt, len(row)),)) for row in rows]
    return collate(examples, range(len(examples)))


def student(folder: Path, family: str) -> PreTrainedModel:
    model = load_model(save_tiny(folder, family, num_layers=2))
    use_short_attention(model)
    return model


def rows_and_gradients(
    model: PreTrainedModel, batch: Batch, way: object
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    rows_NH = way(model, batch)  # type: ignore[operator]  # one of the two functions
    weights_NH = torch.randn(rows_NH.shape, generator=torch.Generator().manual_seed(0))
    (rows_NH * weights_NH).sum().backward()
    return rows_NH, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize(
    ("rows", "num_prompt", "num_shared"),
    [(ALIKE, 7, 6), (ALIKE, 4, 3), (UNLIKE, 1, 0), (ALIKE[:1] * 2, 9, 8)],
    ids=["alike", "targets among what is alike", "unlike", "the same row twice"],
)
def test_a_packed_batch_gives_the_rows_and_gradients_of_the_padded_one(
    rows: list[tuple[int, ...]], num_prompt: int, num_shared: int, family: str, tmp_path: Path
) -> None:
    model = student(tmp_path, family)
    batch = batch_of(rows, num_prompt)
    packing = packing_of(model, batch)
    assert packing is not None
    assert packing.num_shared == num_shared
    packed_NH, packed = rows_and_gradients(model, batch, hidden_rows_alone)
    padded_NH, padded = rows_and_gradients(model, batch, hidden_rows)
    # float32 sums in another order
    torch.testing.assert_close(packed_NH, padded_NH, atol=1e-5, rtol=1e-5)
    assert packed.keys() == padded.keys()
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(hidden_rows_alone(model, batch), padded_NH, atol=1e-5, rtol=1e-5)


def test_every_layer_reads_what_rows_begin_with_once(tmp_path: Path) -> None:
    model = student(tmp_path, "llama")
    batch = batch_of(ALIKE, 7)
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:-1].numel())
    )
    hidden_rows_alone(model, batch)
    # a row's last token is only a target
    num_own = sum(len(row) - 1 - len(SYSTEM) for row in ALIKE)
    assert seen == [len(SYSTEM) + num_own]


def test_packing_is_left_alone_where_it_saves_little_or_cannot_be(tmp_path: Path) -> None:
    model = student(tmp_path, "llama")
    even = [(4, *range(30, 60)), (5, *range(40, 70))]
    assert packing_of(model, batch_of(even, 1)) is None, LEAST_SAVED
    assert packing_of(model, batch_of(ALIKE[:1], 7)) is None  # one row is no longer than itself
    assert packing_of(student(tmp_path, "bloom"), batch_of(ALIKE, 7)) is None
    assert (
        packing_of(load_model(save_tiny(tmp_path, "llama", num_layers=2)), batch_of(ALIKE, 7))
        is None
    )
    assert packing_of(model.double(), batch_of(ALIKE, 7)) is None
    model.float().config.sliding_window = 4
    assert packing_of(model, batch_of(ALIKE, 7)) is None
