"""Layers with int8 weights, and with bfloat16 ones, against the float32 layers."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.contracts.generation import LoadedWeights
from worker.cpu import int8
from worker.cpu.kernels.bindings import Kernels, kernels
from worker.cpu.linear_ops import HAS_BFLOAT16
from worker.cpu.llama_decoder import head_of
from worker.serve.batch_generate import generate_all
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.errors import OptionUnavailable
from worker.serve.loading import load_model

pytestmark = pytest.mark.skipif(not int8.HAS_INT8, reason="this torch has no integer products")

FAMILIES = ("llama", "gpt2", "bloom", "opt", "gpt_neox", "t5", "bart", "bert2bert")


@pytest.fixture
def int8_kernels() -> Kernels:
    ops = kernels()
    if ops is None or not ops.has_int8:
        pytest.skip("this machine has no kernel for int8 weights")
    return ops


@pytest.fixture(params=["kernel", "onednn"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernel, where the machine has it, and what other machines use."""
    if request.param == "onednn":
        monkeypatch.setattr(int8, "int8_kernels", lambda num_inputs: None)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def of_8_bits(layer: nn.Module) -> nn.Module:
    holder = nn.ModuleList([copy.deepcopy(layer).requires_grad_(False)])
    int8.quantize_weights(holder)
    return holder[0]


@pytest.mark.usefixtures("_implementation")
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_product_is_right_to_about_a_hundredth(kind: type[nn.Module]) -> None:
    layer: nn.Module = nn.Linear(96, 160) if kind is nn.Linear else Conv1D(160, 96)
    x = torch.randn(7, 3, 96)
    with torch.no_grad():
        expected, found = layer(x), of_8_bits(layer)(x)
    assert (found - expected).norm() < 0.02 * expected.norm()


ERROR_OF_SUMS = """
import torch
from worker.cpu.int8 import Int8Weight
torch.manual_seed(0)
weight, x = torch.randn(160, 96), torch.randn(21, 96)
exact = x @ weight.T
print(float((Int8Weight(weight).matmul(x, None) - exact).norm() / exact.norm()))
"""


def test_a_cpu_without_vnni_multiplies_as_exactly() -> None:
    errors = [
        float(subprocess.check_output([sys.executable, "-c", ERROR_OF_SUMS], env=os.environ | isa))
        for isa in ({}, {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    ]
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)  # the order of few float32 sums


@pytest.mark.usefixtures("_implementation")
def test_a_rows_outlier_is_nothing_to_its_neighbours() -> None:
    layer = of_8_bits(nn.Linear(64, 64))
    x = torch.randn(4, 64)
    alone = layer(x[:1])
    x[3] *= 1e4
    torch.testing.assert_close(layer(x)[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_implementation")
def test_a_row_of_zeros_gives_the_bias() -> None:
    layer = nn.Linear(32, 8)
    found = of_8_bits(layer)(torch.zeros(1, 32))[0]
    torch.testing.assert_close(found, layer.bias, rtol=2**-8, atol=0)  # the kernel gives bfloat16


def test_the_largest_input_keeps_its_sign_in_bfloat16() -> None:
    layer = nn.Linear(48, 8, bias=False)
    x_BE = torch.zeros(1, 48)
    x_BE[0, 0] = 190  # its scale, rounded to bfloat16, is too small
    quantized = of_8_bits(layer)
    torch.testing.assert_close(
        quantized(x_BE.bfloat16()).float(), quantized(x_BE), rtol=2**-7, atol=1e-3
    )


def test_inputs_that_fill_no_tile_take_the_other_implementation() -> None:
    assert isinstance(of_8_bits(nn.Linear(48, 8)), int8.Int8Linear)


def test_quantized_weights_differ_by_half_a_step_at_most() -> None:
    weight = torch.randn(7, 160) * torch.logspace(-3, 3, 7)[:, None]
    weight[2] = 0.0
    whole, scale = int8.quantize_blocks(weight)
    assert scale.shape == (7, 3)  # the third block has 32 inputs
    steps = scale.float().repeat_interleave(int8.BLOCK_INPUTS, dim=1)[:, :160]
    # a scale in bfloat16 may be a 256th too small for the largest weight, which is 127 steps
    assert (
        (whole * steps - weight).abs() <= steps * torch.where(whole.abs() == 127, 1.0, 0.501)
    ).all()


# outputs, inputs: half a block, a broken panel and block, and whole ones
SHAPES = (
    (16, 32),
    (100, 96),
    (64, 576),
    (250, 1536),
)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_the_int8_kernel_gives_exact_sums_of_integers(
    int8_kernels: Kernels, num_out: int, num_in: int
) -> None:
    torch.manual_seed(num_in)
    weight = torch.randint(-127, 128, (num_out, num_in)).float()
    weight[:, ::32] = 127.0  # every block has a scale of one
    x = torch.randint(-8, 9, (70, num_in)).bfloat16()
    bias = torch.randint(-100, 100, (num_out,)).float()
    exact = (x.double() @ weight.double().T + bias).to(torch.bfloat16)
    packed = int8.pack_int8(weight)
    for num_rows in (1, 3, 8, 9, 20, 70):
        found = int8_kernels.multiply_int8(x[:num_rows], packed, num_out, bias, is_swish=False)
        assert torch.equal(found, exact[:num_rows])


@pytest.mark.parametrize("is_swish", [False, True])
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_the_int8_kernel_is_a_matmul_with_the_quantized_weights(
    int8_kernels: Kernels, num_out: int, num_in: int, is_swish: bool
) -> None:
    torch.manual_seed(0)
    weight, x, bias = (
        torch.randn(num_out, num_in),
        torch.randn(20, num_in).bfloat16(),
        torch.randn(num_out),
    )
    whole, scale = int8.quantize_blocks(weight)
    steps = scale.double().repeat_interleave(int8.BLOCK_INPUTS, dim=1)[:, :num_in]
    exact = x.double() @ (whole * steps).T + bias
    exact = nn.functional.silu(exact) if is_swish else exact
    found = int8_kernels.multiply_int8(x, int8.pack_int8(weight), num_out, bias, is_swish=is_swish)
    # rounded once to bfloat16; near zero, float32 sums of up to 1,536 products
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("num_in", [96, 1536])
def test_a_row_is_the_same_alone_and_in_any_batch_and_with_any_number_of_threads(
    int8_kernels: Kernels, num_in: int
) -> None:
    weight, x = torch.randn(500, num_in), torch.randn(130, num_in).bfloat16()
    packed, num_threads = int8.pack_int8(weight), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for num_rows in (1, 2, 5, 8, 9, 16, 33, 48, 49, 97, 130):
            out = int8_kernels.multiply_int8(x[:num_rows], packed, 500, None, is_swish=False)
            found.append(out[0])
            assert torch.equal(
                out[-1:],
                int8_kernels.multiply_int8(
                    x[num_rows - 1 : num_rows], packed, 500, None, is_swish=False
                ),
            )
    torch.set_num_threads(num_threads)
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_row_that_is_not_a_number_spoils_no_other(int8_kernels: Kernels) -> None:
    packed, x = int8.pack_int8(torch.randn(64, 64)), torch.randn(12, 64).bfloat16()
    x[4, 7] = float("nan")
    out = int8_kernels.multiply_int8(x, packed, 64, None, is_swish=False)
    assert out[4].isnan().all()
    assert out.isnan().sum() == 64


def test_packed_weights_take_about_half_of_bfloat16() -> None:
    weight = torch.randn(576, 1536)
    assert int8.pack_int8(weight).nbytes < 0.52 * weight.bfloat16().nbytes


def test_an_int8_models_layers_run_in_one_call_and_give_the_numbers_of_single_layers(
    int8_kernels: Kernels, tiny_llama_dir: Path
) -> None:
    model = load_model(tiny_llama_dir, weights="int8", keeps_plain=False).model
    logits = []
    for is_whole in (True, False):
        batch = CursorBatch(model, max_rows=4, max_width=64)
        decoder: Any = getattr(batch.family.forward, "__self__")  # noqa: B009  # the type tells of a plain function
        assert decoder._fused is not None
        if not is_whole:
            decoder._fused = None
        steps = [batch.join([[5, 6, 7], [8, 9, 10, 11, 12]])]
        steps += [batch.advance([20 + step, 40 + step]) for step in range(5)]
        logits.append(torch.cat(steps))
    assert torch.equal(*logits)


def test_an_int8_models_answer_does_not_depend_on_the_rest_of_the_batch(
    int8_kernels: Kernels, tiny_llama_dir: Path
) -> None:
    model = load_model(tiny_llama_dir, weights="int8", keeps_plain=False).model
    prompts = [[5 + n, 6, 7 + n] for n in range(12)]
    together = generate_all(model, prompts, max_new_tokens=6)
    alone = [generate_all(model, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]


def test_an_int8_llama_is_near_the_float32_one(int8_kernels: Kernels, tiny_llama_dir: Path) -> None:
    tokens = torch.arange(5, 45).tolist()
    logits = []
    for weights in ("plain", "int8"):
        model = load_model(tiny_llama_dir, weights=weights, keeps_plain=weights == "plain").model
        batch = CursorBatch(model, max_rows=1, max_width=64)
        logits.append(
            torch.cat([batch.join([tokens[:8]]), *(batch.advance([token]) for token in tokens[8:])])
        )
    exact, found = (each.double().log_softmax(-1) for each in logits)
    kl = (exact.exp() * (exact - found)).sum(-1)
    assert kl.mean() < 0.01


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_each_family_answers_nearly_alike_from_less_memory(
    name: str, weights: LoadedWeights, request: pytest.FixtureRequest
) -> None:
    if weights == "bfloat16" and not HAS_BFLOAT16:
        pytest.skip("this CPU does not support bfloat16 matmuls")
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


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU does not support bfloat16 matmuls")
def test_of_bfloat16_layers_the_head_is_left_out_or_its_best_logits_are_exact(
    tiny_llama_dir: Path,
) -> None:
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


def test_without_the_kernel_the_head_is_not_quantized(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.cpu.model_preparation.int8_kernels", lambda num_inputs: None)
    monkeypatch.setattr(int8, "int8_kernels", lambda num_inputs: None)
    model: Any = load_model(tiny_llama_dir, weights="int8").model
    assert not isinstance(model.lm_head, int8.Int8Linear)
    assert model.lm_head.packed.dtype == torch.float32
    assert isinstance(model.model.layers[0].mlp.up_proj, int8.Int8Linear)


def test_the_best_logits_of_a_quantized_head_are_exact(
    int8_kernels: Kernels, tiny_llama_dir: Path
) -> None:
    model: Any = load_model(tiny_llama_dir, weights="int8", keeps_plain=False).model
    assert isinstance(model.lm_head.packed, int8.TiledInt8Weight)
    hidden = torch.randn(2, 1, model.lm_head.in_features)
    exact = hidden @ model.lm_head.weight.T
    best = exact.argmax(-1, keepdim=True)
    torch.testing.assert_close(head_of(model)(hidden).gather(-1, best), exact.gather(-1, best))
