"""Quantised teachers, compared with the same weights dequantised and multiplied in float32."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PreTrainedModel

from app.contracts.distillation import TeacherPrecision
from app.contracts.memory.teacher_weights import INT4_GROUP, teacher_weight_bytes
from tests.tiny import save_tiny
from worker.distill.students.recipe import load_model
from worker.distill.teachers import quantized
from worker.distill.teachers.identity import outputs_identity
from worker.distill.teachers.quantized import (
    check_precision,
    load_quantized,
    num_quantizable,
    quantizable_layers,
    stored_bytes,
)
from worker.errors import UnsupportedPrecision

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason='needs torchao: pip install -e ".[quantized]"'
)
ON_CPU: list[TeacherPrecision] = ["int8", "int4"]
FAMILIES = ["llama", "qwen2", "phi3", "bloom", "opt", "gpt_neox", "t5", "bart", "bert"]
TOKENS = torch.tensor([[5, 9, 40, 77, 98, 21, 13, 61]])


def load(folder: Path, precision: TeacherPrecision) -> PreTrainedModel:
    return load_quantized(folder, precision, device="cpu", dtype=torch.float32)


def dequantised(layer: nn.Linear) -> Tensor:
    """The weight [O, I] that a layer multiplies with: its outputs for the rows of the identity."""
    outputs_IO: Tensor = layer(torch.eye(layer.in_features))
    return outputs_IO.t() if layer.bias is None else (outputs_IO - layer.bias).t()


def rounding_step(weight_OI: Tensor, precision: TeacherPrecision) -> Tensor:
    """The distance between two values of the format, for each weight."""
    if precision == "int8":
        return (weight_OI.abs().amax(dim=1, keepdim=True) / 127).expand_as(weight_OI)
    groups_OGW = weight_OI.view(len(weight_OI), -1, INT4_GROUP)
    range_OG1 = groups_OGW.amax(dim=2, keepdim=True) - groups_OGW.amin(dim=2, keepdim=True)
    return (range_OG1 / 15).expand_as(groups_OGW).reshape(weight_OI.shape)


def outputs(model: PreTrainedModel) -> Tensor:
    if model.config.is_encoder_decoder:
        logits: Tensor = model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    else:
        logits = model(input_ids=TOKENS).logits
    return logits


@needs_torchao
@pytest.mark.parametrize("precision", ON_CPU)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_quantised_model_computes_with_its_rounded_weights(
    tmp_path: Path, family: str, precision: TeacherPrecision
) -> None:
    folder = save_tiny(tmp_path / family, family, num_layers=2)
    full, small = load_model(folder), load(folder, precision)
    layers = quantizable_layers(full)
    assert layers
    for name, layer in layers.items():
        weight_OI = dequantised(small.get_submodule(name))
        # half a step, and 2% of one for the sums of float32
        steps_OI = rounding_step(layer.weight, precision)
        assert ((weight_OI - layer.weight).abs() <= 0.52 * steps_OI).all(), name
        assert not torch.equal(weight_OI, layer.weight), name
        layer.weight.copy_(weight_OI)
    # both sum in float32, in another order
    torch.testing.assert_close(outputs(small), outputs(full), rtol=1e-3, atol=1e-3)


@needs_torchao
@pytest.mark.parametrize("precision", ON_CPU)
def test_embeddings_norms_and_head_are_not_quantised(
    tiny_llama_dir: Path, precision: TeacherPrecision
) -> None:
    full, small = load_model(tiny_llama_dir), load(tiny_llama_dir, precision)
    quantised = {f"{name}.weight" for name in quantizable_layers(full)}
    for name, weight in full.named_parameters():
        loaded = small.get_parameter(name)
        assert (type(loaded) is nn.Parameter) == (name not in quantised)
        assert name in quantised or torch.equal(loaded, weight)


@needs_torchao
@pytest.mark.parametrize("precision", ON_CPU)
def test_the_estimate_counts_the_bytes_of_quantised_weights(
    tiny_llama_dir: Path, precision: TeacherPrecision
) -> None:
    full, small = load_model(tiny_llama_dir), load(tiny_llama_dir, precision)
    num_others = sum(p.numel() for p in full.parameters()) - num_quantizable(full)
    expected = teacher_weight_bytes(num_quantizable(full), num_others, precision, 4)
    # the estimate leaves out the scales of rows: four bytes for 64 weights of int8
    assert sum(map(stored_bytes, small.parameters())) == pytest.approx(expected, rel=0.07)
    assert sum(map(stored_bytes, full.parameters())) == sum(p.nbytes for p in full.parameters())


def test_bytes_of_a_teacher_by_hand() -> None:
    assert teacher_weight_bytes(640, 10, "auto", 2) == 2 * 650
    assert teacher_weight_bytes(640, 10, "int8", 2) == 640 + 20
    assert teacher_weight_bytes(640, 10, "fp8", 2) == 640 + 20
    assert teacher_weight_bytes(640, 10, "int4", 2) == 320 + 20 * 4 + 20


@needs_torchao
def test_layers_that_do_not_fit_the_format_are_refused() -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
    odd = LlamaConfig(hidden_size=64, intermediate_size=80, **sizes)
    check_precision("int8", odd, device="cpu")
    with pytest.raises(
        UnsupportedPrecision, match=r"multiples of 32, but .*down_proj has 80 inputs"
    ):
        check_precision("int4", odd, device="cpu")
    with pytest.raises(UnsupportedPrecision, match=r"not nn\.Linear"):
        check_precision("int8", GPT2Config(n_embd=64, n_layer=1, n_head=4), device="cpu")
    with pytest.raises(UnsupportedPrecision, match=r"compute capability 8\.9"):
        check_precision("fp8", odd, device="cpu")


def test_a_worker_without_the_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized, "QUANTIZATION_PACKAGE", "not_installed_here")
    with pytest.raises(UnsupportedPrecision, match=r"worker,quantized"):
        check_precision("int8", LlamaConfig(num_hidden_layers=1), device="cpu")


@needs_torchao
def test_each_precision_has_an_identity_of_its_own() -> None:
    names = {outputs_identity("sha", precision) for precision in ("auto", "int8", "int4", "fp8")}
    assert len(names) == 4
    assert outputs_identity("sha", "auto") == "sha"


@needs_torchao
@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_the_formats_of_a_gpu_exist_in_torchao(precision: TeacherPrecision) -> None:
    from torchao.core.config import AOBaseConfig

    assert isinstance(quantized.format_of(precision, "cuda"), AOBaseConfig)
