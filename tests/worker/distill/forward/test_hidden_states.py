"""The states a head multiplies, in a padded batch, against the model's own logits of one row at a time."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.tiny import save_tiny
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import (
    MOST_KEPT,
    decoder_of,
    hidden_rows,
    hidden_rows_alone,
    last_mlp,
)
from worker.distill.losses.lm_head import head_of, new_scratch, split_rows, write_logits
from worker.distill.students.recipe import load_model
from worker.models.architectures import CAUSAL, SEQ2SEQ

SOURCES = [(5, 6, 7, 8, 9, 10), (11, 12, 13), (20, 21, 22, 23)]
ROWS = [(4, 30, 31, 32, 33), (4, 40, 41), (4, 50, 51, 52)]


def examples_of(*, has_source: bool) -> list[Example]:
    if has_source:
        return [
            Example(r, ((1, len(r)),), source_ids=s) for r, s in zip(ROWS, SOURCES, strict=True)
        ]
    return [
        Example((*s, *r), ((len(s), len(s) + len(r)),)) for r, s in zip(ROWS, SOURCES, strict=True)
    ]


@pytest.mark.parametrize("family", sorted((*CAUSAL, *SEQ2SEQ)))
def test_states_of_a_padded_batch_give_the_logits_of_each_row_alone(
    family: str, tmp_path: Path
) -> None:
    model = load_model(save_tiny(tmp_path, family, num_layers=2))
    examples = examples_of(has_source=family in SEQ2SEQ)
    batch = collate(examples, range(len(examples)))
    with torch.no_grad():
        hidden_NH = hidden_rows(model, batch)
        head = head_of(model)
        scratch_NV = new_scratch(split_rows(len(hidden_NH), head, len(hidden_NH)), head)
        logits_NV = write_logits(head, hidden_NH, scratch_NV)
        alone = []
        for example in examples:
            ids_1T = torch.tensor([example.token_ids[:-1]])
            inputs = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
            if example.source_ids:
                source_1S = torch.tensor([example.source_ids])
                inputs = {"input_ids": source_1S, "attention_mask": torch.ones_like(source_1S)}
                inputs["decoder_input_ids"] = ids_1T
            alone.append(model(**inputs).logits[0][[p - 1 for p in example.target_positions]])
    # float32 sums in another order: padding changes the shapes of the products
    torch.testing.assert_close(logits_NV, torch.cat(alone), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", sorted((*CAUSAL, *SEQ2SEQ)))
def test_the_last_mlp_at_the_targets_alone_gives_the_same_rows_and_gradients(
    family: str, tmp_path: Path
) -> None:
    model = load_model(save_tiny(tmp_path, family, num_layers=2))
    examples = examples_of(has_source=family in SEQ2SEQ)
    batch = collate(examples, range(len(examples)))
    assert batch.num_targets < MOST_KEPT * batch.keep_BT.numel()  # so that it is asked for
    rows_NH = {}
    gradients = {}
    for way in (hidden_rows, hidden_rows_alone):
        model.zero_grad()
        rows_NH[way] = way(model, batch)
        weights_NH = torch.randn(rows_NH[way].shape, generator=torch.Generator().manual_seed(0))
        (rows_NH[way] * weights_NH).sum().backward()
        gradients[way] = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
    # float32 products of other shapes
    torch.testing.assert_close(
        rows_NH[hidden_rows_alone], rows_NH[hidden_rows], atol=1e-5, rtol=1e-5
    )
    assert gradients[hidden_rows_alone].keys() == gradients[hidden_rows].keys()
    for name, gradient in gradients[hidden_rows].items():
        torch.testing.assert_close(
            gradients[hidden_rows_alone][name], gradient, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox", "t5"])
def test_the_last_mlp_reads_no_other_positions(family: str, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path, family, num_layers=2))
    examples = examples_of(has_source=family in SEQ2SEQ)
    batch = collate(examples, range(len(examples)))
    mlp = last_mlp(decoder_of(model))
    assert mlp is not None
    seen: list[int] = []
    linear = next(m for m in mlp.modules() if isinstance(m, nn.Linear | Conv1D))
    linear.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].numel() // args[0].shape[-1])
    )
    hidden_rows_alone(model, batch)
    hidden_rows(model, batch)
    assert seen == [batch.num_targets, batch.keep_BT.numel()]
