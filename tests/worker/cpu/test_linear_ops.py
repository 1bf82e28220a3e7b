"""oneDNN's products and those by tiles against torch's own: float32 sums in another order, so equal to a few units in the last place."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from worker.cpu import linear_ops
from worker.cpu.kernels.bindings import kernels


def assert_close(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    """Sums of at most a few hundred terms of size one."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, params=["onednn", "mkl", "tiles"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever this processor would choose."""
    ops = kernels()
    if request.param == "tiles" and not (ops and ops.has_splits):
        pytest.skip("this CPU has no tiles")
    monkeypatch.setattr(
        linear_ops, "PREFERS_ONEDNN", linear_ops.HAS_ONEDNN and request.param == "onednn"
    )
    monkeypatch.setattr(linear_ops, "LEAST_SIDE", 0 if request.param == "tiles" else math.inf)
    monkeypatch.setattr(linear_ops, "LEAST_DEPTH", 0)


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24), (2, 0, 24)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_and_its_gradients_equal_torchs(shape: tuple[int, ...], has_bias: bool) -> None:
    weight, bias = torch.randn(40, 24), torch.randn(40) if has_bias else None
    results = []
    for function in (linear_ops.linear, nn.functional.linear):
        torch.manual_seed(1)
        x = torch.randn(shape, requires_grad=True)
        w = weight.clone().requires_grad_()
        b = None if bias is None else bias.clone().requires_grad_()
        y = function(x, w, b)
        (y * torch.linspace(-1, 1, 40)).sum().backward()
        results.append([y, x.grad, w.grad, None if b is None else b.grad])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


def test_a_weights_gradient_is_the_same_to_the_bit_every_time() -> None:
    torch.set_num_threads(2)
    grad_NO, x_NI = torch.randn(301, 1536), torch.randn(301, 576)
    first = linear_ops.weight_gradient(grad_NO, x_NI)
    # sums of 301 in another order
    torch.testing.assert_close(first, grad_NO.t() @ x_NI, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(linear_ops.weight_gradient(grad_NO, x_NI), first) for _ in range(10))


def test_a_result_goes_where_there_is_room_or_onto_what_there_is() -> None:
    a, b, bias, room = torch.randn(9, 40), torch.randn(33, 40), torch.randn(33), torch.empty(9, 33)
    assert_close(linear_ops.matmul(a, b, scratch_NO=room), a @ b.t())
    assert_close(linear_ops.matmul(a, b, bias, scratch_NO=room), a @ b.t() + bias)
    assert_close(linear_ops.matmul(a, torch.randn(40, 33).t().copy_(b), scratch_NO=room), a @ b.t())
    onto = torch.randn(33, 40)
    grad, expected = torch.randn(9, 33), onto.clone()
    assert linear_ops.weight_gradient(grad, a, onto_OI=onto) is onto
    assert_close(onto, expected + grad.t() @ a)


def test_a_frozen_weight_gets_no_gradient_and_its_input_does() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    linear_ops.use_onednn(layer)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert_close(x.grad, layer.weight.sum(dim=0).expand(3, 8))


def test_double_precision_falls_back_to_torch() -> None:
    layer = nn.Linear(8, 4).double()
    expected = layer(torch.ones(2, 8, dtype=torch.float64))
    linear_ops.pack_weights(layer)
    assert torch.equal(layer(torch.ones(2, 8, dtype=torch.float64)), expected)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_packed_weights_give_the_same_output(kind: type[nn.Module]) -> None:
    layer: nn.Module = nn.Linear(24, 40) if kind is nn.Linear else Conv1D(40, 24)
    plain = copy.deepcopy(layer)
    num_bytes = linear_ops.pack_weights(layer)
    assert num_bytes == (24 * 40 * 4 if linear_ops.HAS_ONEDNN else 0)
    for num_rows in (1, 2, 9, 33):
        x = torch.randn(num_rows, 24)
        assert_close(layer(x), plain(x))
    with torch.no_grad():
        layer.get_parameter("weight").zero_()
        assert_close(copy.deepcopy(layer)(x), plain.get_parameter("bias").expand(33, 40))


@pytest.mark.skipif(not linear_ops.HAS_ONEDNN, reason="nothing is packed without oneDNN")
def test_packed_layers_can_do_without_their_plain_weights_but_not_those_that_others_share() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
    model["body"] = nn.Linear(6, 6)
    model.get_submodule("head").weight = model.get_submodule("embed").weight
    x = torch.randn(3, 6)
    expected = model.get_submodule("head")(model.get_submodule("body")(x))
    linear_ops.pack_weights(model, keeps_plain=False)
    assert model.get_parameter("body.weight").is_meta
    assert not model.get_parameter("head.weight").is_meta
    assert_close(model.get_submodule("head")(model.get_submodule("body")(x)), expected)


def test_a_swapped_layer_keeps_its_state_its_ties_and_its_copy() -> None:
    head, embed = nn.Linear(6, 10, bias=False), nn.Embedding(10, 6)
    model = nn.ModuleDict({"embed": embed, "head": head})
    head.weight = embed.weight
    names = list(model.state_dict())
    linear_ops.use_onednn(model)
    assert list(model.state_dict()) == names
    assert head.weight is embed.weight
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter("head.weight").zero_()
    assert twin.get_submodule("head")(torch.ones(1, 6)).abs().sum() == 0
    assert head(torch.ones(1, 6)).abs().sum() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_model_computes_the_same_logits(
    family: str, tiny_llama_dir: Path, tiny_gpt2_dir: Path
) -> None:
    folder = tiny_llama_dir if family == "llama" else tiny_gpt2_dir
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        linear_ops.pack_weights(model)
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.skipif(
    not linear_ops.HAS_BFLOAT16, reason="this CPU does not support bfloat16 matmuls"
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_weight_in_bfloat16_rounds_and_no_more(has_bias: bool) -> None:
    layer = nn.Linear(96, 160, bias=has_bias).requires_grad_(False)
    x = torch.randn(7, 96)
    expected = layer(x)
    linear_ops.pack_weights(nn.ModuleList([layer]), dtype=torch.bfloat16)
    assert (layer(x) - expected).norm() < 0.01 * expected.norm()  # bfloat16 has 8 bits
    swished = linear_ops.multiplier(layer, "swish")(x)
    assert (swished - nn.functional.silu(expected)).norm() < 0.01 * expected.norm()


@pytest.mark.skipif(
    not linear_ops.HAS_BFLOAT16, reason="this CPU does not support bfloat16 matmuls"
)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_that_rounds_has_float32_gradients_that_are_rounded_and_no_more(
    kind: type[nn.Module],
) -> None:
    layer: nn.Module = nn.Linear(96, 160) if kind is nn.Linear else Conv1D(160, 96)
    plain = copy.deepcopy(layer)
    linear_ops.use_onednn(layer, torch.bfloat16)
    x, slope = torch.randn(3, 7, 96), torch.randn(3, 7, 160)
    results = []
    for each in (layer, plain):
        own = x.clone().requires_grad_()
        y = each(own)
        (y * slope).sum().backward()
        gradients = [each.get_parameter(name).grad for name in ("weight", "bias")]
        results.append([y, own.grad, *gradients])
        with torch.no_grad():
            torch.testing.assert_close(each(x), y)
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()  # bfloat16 has 8 bits
    assert not torch.equal(results[0][0], results[1][0])  # else nothing was rounded


def test_all_layers_but_one_round() -> None:
    model = nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.Linear(6, 10)})
    linear_ops.use_onednn(model, torch.bfloat16, exact=model.get_submodule("head"))
    assert model["body"].rounds_to == torch.bfloat16
    assert model["head"].rounds_to == torch.float32
