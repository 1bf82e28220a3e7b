"""Only whole, plain safetensors folders load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from worker.cpu.linear_ops import HAS_ONEDNN
from worker.serve.errors import ModelLoadFailed, UnsupportedModel
from worker.serve.loading import LoadedModel, load_model


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def test_a_model_loads_in_float32_without_gradients(llama: LoadedModel) -> None:
    assert {parameter.dtype for parameter in llama.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in llama.model.parameters())
    plain = 4 * sum(parameter.numel() for parameter in llama.model.parameters())
    linear = 4 * sum(m.weight.numel() for m in llama.model.modules() if isinstance(m, nn.Linear))
    # packed weights lie beside the plain ones
    assert llama.num_bytes == plain + (linear if HAS_ONEDNN else 0)


def test_a_half_precision_checkpoint_is_widened(folder: Path) -> None:
    weights = {
        name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert next(load_model(folder).model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_names_code_is_refused(folder: Path, name: str) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    )
    with pytest.raises(ModelLoadFailed, match="auto_map"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadFailed):
        load_model(folder)


def test_a_missing_weight_is_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadFailed, match=r"layers\.2\.mlp\.up_proj"):
        load_model(folder)


def test_cut_off_weights_are_refused(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelLoadFailed):
        load_model(folder)


def test_a_folder_that_is_not_there_is_a_failed_load(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed):
        load_model(tmp_path / "nothing")


def test_another_family_is_refused(tmp_path: Path, folder: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    GPTJForCausalLM(
        GPTJConfig(vocab_size=384, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    ).save_pretrained(tmp_path / "gptj")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "gptj" / name)
    with pytest.raises(UnsupportedModel, match="gptj"):
        load_model(tmp_path / "gptj")


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_t5_keeps_its_head_apart_from_its_embedding_where_they_differ(
    tiny_t5_dir: Path, tmp_path: Path, is_tied: bool
) -> None:
    folder = Path(shutil.copytree(tiny_t5_dir, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    shared = weights["shared.weight"]
    head = shared if is_tied else torch.randn_like(shared)
    if not is_tied:
        save_file(
            weights | {"lm_head.weight": head},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    model: Any = load_model(folder).model
    for weight, expected in (
        (model.lm_head.weight, head),
        (model.shared.weight, shared),
        (model.encoder.embed_tokens.weight, shared),
        (model.decoder.embed_tokens.weight, shared),
    ):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_alone_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(
        UnsupportedModel,
        match=f"^{name} is an encoder and does not generate text; use it as a teacher$",
    ):
        load_model(request.getfixturevalue(f"tiny_{name}_dir"))


def test_halves_that_are_not_listed_are_refused(tiny_bert2bert_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert2bert_dir, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["model_type"] = "electra"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"'electra' and 'bert'.*bert, gpt2, roberta"):
        load_model(folder)
