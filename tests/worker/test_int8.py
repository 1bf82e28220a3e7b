"""Layers with weights of 8 bits, and of 16, against the layers that they were made of."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.contracts import LoadedWeights
from worker import int8
from worker.gemm import HAS_BFLOAT16
from worker.native import kernels
from worker.serve.errors import OptionUnavailable
from worker.serve.lean import head_of
from worker.serve.loading import load_model
from worker.serve.offline import generate_all

pytestmark = pytest.mark.skipif(not int8.HAS_INT8, reason="this torch has no integer products")

FAMILIES = ("llama", "gpt2", "bloom", "opt", "gpt_neox", "t5", "bart", "bert2bert")


def of_8_bits(layer: nn.Module) -> nn.Module:
    holder = nn.ModuleList([copy.deepcopy(layer).requires_grad_(False)])
    int8.quantize_weights(holder)
    return holder[0]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_product_is_right_to_about_a_hundredth(kind: type[nn.Module]) -> None:
    layer: nn.Module = nn.Linear(96, 160) if kind is nn.Linear else Conv1D(160, 96)
    x = torch.randn(7, 3, 96)
    with torch.no_grad():
        expected, found = layer(x), of_8_bits(layer)(x)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_rows_outlier_is_nothing_to_its_neighbours() -> None:
    layer = of_8_bits(nn.Linear(64, 64))
    x = torch.randn(4, 64)
    alone = layer(x[:1])
    x[3] *= 1e4
    torch.testing.assert_close(layer(x)[:1], alone, rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_gives_the_bias() -> None:
    layer = nn.Linear(16, 8)
    torch.testing.assert_close(of_8_bits(layer)(torch.zeros(1, 16))[0], layer.bias)


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_each_family_answers_nearly_alike_from_less_memory(
    name: str, weights: LoadedWeights, request: pytest.FixtureRequest
) -> None:
    if weights == "bfloat16" and not HAS_BFLOAT16:
        pytest.skip("this CPU has no products of bfloat16")
    folder: Path = request.getfixturevalue(f"tiny_{name}_dir")
    plain, small = load_model(folder), load_model(folder, weights=weights)
    assert small.num_bytes < plain.num_bytes
    tokens = torch.arange(5, 45)[None]
    inputs = {"input_ids": tokens}
    if plain.model.config.is_encoder_decoder:  # type: ignore[union-attr]  # typed as a module
        inputs["decoder_input_ids"] = tokens[:, :10]
    with torch.no_grad():
        expected, found = (model.model(**inputs).logits for model in (plain, small))
    # random wide weights make a deep model chaotic: it is the direction that must be kept
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98
    [answer] = generate_all(small.model, [tokens[0].tolist()], max_new_tokens=4)
    assert answer.tokens


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU has no products of bfloat16")
def test_of_bfloat16_layers_the_head_is_left_out_or_its_best_logits_are_exact(tiny_llama_dir: Path) -> None:
    model: Any = load_model(tiny_llama_dir, weights="bfloat16").model
    head = model.lm_head
    assert head.packed.dtype == (torch.float32 if kernels() is None else torch.bfloat16)
    hidden = torch.randn(1, 3, head.in_features)
    exact = hidden @ head.weight.T
    found = head_of(model)(hidden)
    assert found.shape == exact.shape
    best = exact.argmax(-1, keepdim=True)
    torch.testing.assert_close(found.gather(-1, best), exact.gather(-1, best))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.packed.tensor.dtype == torch.bfloat16
    assert layer.weight.is_meta
    assert layer(torch.randn(3, layer.in_features)).dtype == torch.float32


def test_only_a_cpu_has_them(tiny_llama_dir: Path) -> None:
    with pytest.raises(OptionUnavailable):
        load_model(tiny_llama_dir, device="cuda", weights="int8")


def test_the_head_stays_as_it_is(tiny_llama_dir: Path) -> None:
    model: Any = load_model(tiny_llama_dir, weights="int8").model
    assert not isinstance(model.lm_head, int8.Int8Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, int8.Int8Linear)
