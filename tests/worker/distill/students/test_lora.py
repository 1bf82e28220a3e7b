from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from app.contracts.distillation import Lora, Student
from tests.adapters import save_adapted
from worker.cpu.linear_ops import pack_weights, use_onednn
from worker.distill.students.lora import (
    add_lora,
    load_lora_tensors,
    lora_tensors,
    plain_model,
)
from worker.distill.students.recipe import load_model, load_student, plan_student
from worker.errors import CorruptCheckpoint
from worker.models.adapters import merge_adapters, read_adapters
from worker.models.architectures import layer_counts

FAMILIES = ("llama", "gpt2", "bloom", "opt", "gpt_neox", "t5", "bart", "bert2bert")
TOKENS_BT = torch.arange(3, 23).view(2, 10)
RANK_4 = Lora(rank=4, alpha=8.0)


def load(request: pytest.FixtureRequest, family: str) -> PreTrainedModel:
    return load_model(request.getfixturevalue(f"tiny_{family}_dir"))


def run(model: Any) -> Tensor:  # Any: transformers is untyped here
    inputs = {"input_ids": TOKENS_BT, "attention_mask": torch.ones_like(TOKENS_BT)}
    if layer_counts(model.config)[0]:
        inputs["decoder_input_ids"] = TOKENS_BT.flip(1)
    found: Tensor = model(**inputs, use_cache=False).logits
    return found


@torch.no_grad()
def trained(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """With adapters that have moved."""
    add_lora(model, RANK_4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora_tensors(model).values():
        tensor.normal_(0.0, 0.05, generator=generator)
    return model


def save(model: PreTrainedModel, folder: Path, dtype: Any = "float32") -> Path:
    return save_adapted(model, folder, RANK_4, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()  # attention takes another path where a position bias has a gradient
def test_untrained_adapters_change_nothing(request: pytest.FixtureRequest, family: str) -> None:
    model = load(request, family)
    use_onednn(model)
    before = run(model)
    add_lora(model, RANK_4, seed=0)
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_are_trained_and_all_of_them(
    request: pytest.FixtureRequest, family: str
) -> None:
    model = trained(load(request, family))
    run(model).square().mean().backward()
    moved = {
        name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())
    }
    assert moved == lora_tensors(model).keys()


def test_every_linear_layer_but_the_head_is_adapted(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir)
    add_lora(model, RANK_4, seed=0)
    layers = {name.split(".", 3)[3].rpartition(".")[0] for name in lora_tensors(model)}
    attention = {f"self_attn.{letter}_proj" for letter in "qkvo"}
    assert layers == attention | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert len(lora_tensors(model)) == 2 * 4 * 7


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_computes_what_the_adapters_do(
    request: pytest.FixtureRequest, family: str, tmp_path: Path
) -> None:
    model, start_dir = (
        trained(load(request, family)),
        request.getfixturevalue(f"tiny_{family}_dir"),
    )
    with_adapters = run(model)
    assert not torch.allclose(with_adapters, run(load(request, family)), atol=1e-2)
    plain = plain_model(save(model, tmp_path / "saved"), start_dir, tmp_path / "plain")
    torch.testing.assert_close(run(load_model(plain)), with_adapters, rtol=1e-4, atol=1e-4)
    assert plain_model(plain, start_dir, tmp_path / "again") == plain  # it has no adapters


def test_a_start_in_several_files_is_merged_file_by_file(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    start, model = load_model(tiny_llama_dir), trained(load_model(tiny_llama_dir))
    start.save_pretrained(tmp_path / "start", max_shard_size="200KB")
    saved = save(model, tmp_path / "saved", "bfloat16")
    plain = merge_adapters(tmp_path / "start", saved, tmp_path / "plain")
    assert len(list(plain.glob("*.safetensors"))) > 1
    weights = load_model(plain, torch.bfloat16).state_dict()
    a_RI, b_OR = (
        lora_tensors(model)[f"model.layers.1.mlp.up_proj.lora_{x}"] for x in ("a_RI", "b_OR")
    )
    name = "model.layers.1.mlp.up_proj.weight"
    sum_OI = start.state_dict()[name].bfloat16() + 2.0 * (b_OR @ a_RI)
    assert torch.equal(weights[name], sum_OI.bfloat16())
    assert torch.equal(
        weights["model.embed_tokens.weight"],
        start.state_dict()["model.embed_tokens.weight"].bfloat16(),
    )


def test_adapters_of_another_model_are_not_merged(
    tiny_llama_dir: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    saved = save(trained(load_model(tiny_llama_dir)), tmp_path / "saved")
    with pytest.raises(CorruptCheckpoint, match="submit the job again"):
        merge_adapters(tiny_gpt2_dir, saved, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_adapters_are_read_back_exactly(
    request: pytest.FixtureRequest, family: str, tmp_path: Path
) -> None:
    model = trained(load(request, family))
    found, own = read_adapters(save(model, tmp_path / "saved")), lora_tensors(model)
    assert found.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())


def test_a_model_is_resumed_exactly_from_its_adapters(tiny_gpt2_dir: Path) -> None:
    model, resumed = trained(load_model(tiny_gpt2_dir)), load_model(tiny_gpt2_dir)
    add_lora(resumed, RANK_4, seed=7)
    load_lora_tensors(resumed, lora_tensors(model))
    assert torch.equal(run(resumed), run(model))


def test_adapters_of_another_rank_are_refused(tiny_gpt2_dir: Path) -> None:
    model, other = load_model(tiny_gpt2_dir), load_model(tiny_gpt2_dir)
    add_lora(model, RANK_4, seed=0)
    add_lora(other, Lora(rank=8), seed=0)
    with pytest.raises(CorruptCheckpoint, match="submit the job again"):
        load_lora_tensors(model, lora_tensors(other))


def test_the_seed_decides_the_adapters(tiny_llama_dir: Path) -> None:
    def adapters(seed: int) -> dict[str, Tensor]:
        model = load_model(tiny_llama_dir)
        add_lora(model, RANK_4, seed=seed)
        return lora_tensors(model)

    one, same, other = adapters(1), adapters(1), adapters(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("swap", [use_onednn, pack_weights])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_onednn_layers_keep_their_adapters(
    request: pytest.FixtureRequest, family: str, swap: Any
) -> None:  # Any: one returns the bytes it took
    model = trained(load(request, family))
    before = run(model)
    swap(model)
    with torch.no_grad():
        torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)


LOWERED = ("llama", "gpt2", "t5")


def test_a_start_in_the_dtype_of_autocast_is_loaded_as_it_is(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    load_model(tiny_llama_dir).to(torch.bfloat16).save_pretrained(tmp_path)
    recipe = plan_student(tiny_llama_dir, tmp_path, Student(init="lora"))
    lowered = load_student(recipe, None, seed=0, frozen_dtype=torch.bfloat16)
    plain = load_student(recipe, None, seed=0)
    for (name, one), other in zip(lowered.named_parameters(), plain.parameters(), strict=True):
        is_adapted = one.dtype == torch.bfloat16
        assert is_adapted == name.endswith("_proj.weight")
        assert torch.equal(one.float(), other)


@pytest.mark.parametrize("family", LOWERED)
@torch.no_grad()
def test_lowered_weights_compute_under_autocast_what_float32_weights_do(
    request: pytest.FixtureRequest, family: str
) -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load(request, family)
        add_lora(model, RANK_4, seed=0, base_dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("family", LOWERED)
@torch.no_grad()
def test_a_student_with_lowered_weights_runs_without_autocast_and_is_merged_in_bfloat16(
    request: pytest.FixtureRequest, family: str, tmp_path: Path
) -> None:
    model = load(request, family)
    add_lora(model, RANK_4, seed=0, base_dtype=torch.bfloat16)
    for tensor in lora_tensors(model).values():
        assert tensor.dtype == torch.float32
        tensor.normal_(0.0, 0.05)
    before = run(model)
    saved = save(model, tmp_path / "saved", "bfloat16")
    start_dir = request.getfixturevalue(f"tiny_{family}_dir")
    plain = merge_adapters(start_dir, saved, tmp_path / "plain")
    # bfloat16 has 8 bits, and rounding errors grow from layer to layer
    assert (run(load_model(plain)) - before).abs().mean() < 0.1 * before.std()
    tensors = load_file(plain / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
