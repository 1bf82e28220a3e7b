"""Heads taken from models and from folders."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, EncoderDecoderModel

from worker.distill.losses.lm_head import (
    Head,
    expected_rows,
    head_of,
    load_head,
    top_rows,
    write_logits,
)
from worker.errors import UnsupportedModel, VocabMismatch
from worker.models.architectures import model_class, read_config

FAMILIES = [
    "llama",
    "gpt2",
    "bloom",
    "opt",
    "gpt_neox",
    "t5",
    "bart",
    "bert",
    "roberta",
    "bert2bert",
]


def make_logits(model: Any) -> tuple[Tensor, Tensor]:  # Any: transformers is untyped here
    """The model's logits of some tokens, and what came in at the matrix that made them."""
    caught: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: caught.append(given[0])
    )
    ids = torch.arange(5, 40)[None]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    logits = model(**inputs).logits[0]
    hook.remove()
    return logits, caught[0][0]


def load(folder: Path) -> Any:  # Any: transformers is untyped here
    """With a bias that counts, where there is one."""
    model = model_class(read_config(folder)).from_pretrained(folder).eval()
    bias = head_of(model).bias_V
    if bias is not None:
        with torch.no_grad():
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(7)))
    return model


@pytest.fixture(params=FAMILIES)
def family_dir(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"tiny_{request.param}_dir")
    return folder


def assert_makes_logits(head: Head, hidden: Tensor, logits: Tensor) -> None:
    made = write_logits(head, hidden, torch.empty_like(logits))
    torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_head_of_a_model_makes_its_logits(family_dir: Path, tmp_path: Path) -> None:
    model = load(family_dir)
    logits, hidden = make_logits(model)
    assert_makes_logits(head_of(model), hidden, logits)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert_makes_logits(load_head(tmp_path), hidden, logits)


@torch.no_grad()
def test_a_cut_head_keeps_the_first_tokens(family_dir: Path, tmp_path: Path) -> None:
    model = load(family_dir)
    model.save_pretrained(tmp_path)
    whole = head_of(model)
    for head in (head_of(model, 90), load_head(tmp_path, 90)):
        assert torch.equal(head.weight_VH, whole.weight_VH[:90])
        if whole.bias_V is None or head.bias_V is None:
            assert head.bias_V is whole.bias_V
        else:
            assert torch.equal(head.bias_V, whole.bias_V[:90])
        assert (head.scale, head.softcap) == (whole.scale, whole.softcap)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["gpt2", "roberta"])
def test_an_encoder_decoder_has_its_decoders_head(
    decoder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(
        request.getfixturevalue("tiny_bert_dir"), request.getfixturevalue(f"tiny_{decoder}_dir")
    )
    model.save_pretrained(tmp_path)
    model = load(tmp_path)
    logits, hidden = make_logits(model)
    assert_makes_logits(head_of(model), hidden, logits)
    model.save_pretrained(tmp_path)
    assert_makes_logits(load_head(tmp_path), hidden, logits)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [True, False])
def test_a_t5_scales_the_states_of_its_decoder_if_its_config_says_so(
    scaled: bool, tiny_t5_dir: Path, tmp_path: Path
) -> None:
    model = load(tiny_t5_dir)
    model.config.scale_decoder_outputs = scaled
    logits, multiplied = make_logits(model)
    states = multiplied * model.config.d_model**0.5 if scaled else multiplied
    assert_makes_logits(head_of(model), states, logits)
    model.save_pretrained(tmp_path)
    assert_makes_logits(load_head(tmp_path), states, logits)


def test_gradients_reach_weight_and_bias_through_a_cut_head(tiny_bert2bert_dir: Path) -> None:
    model = load(tiny_bert2bert_dir)
    head = head_of(model, 90)
    assert head.bias_V is not None
    (head.weight_VH.sum() + head.bias_V.sum()).backward()
    predictions = model.decoder.cls.predictions
    for gradient in (predictions.decoder.weight.grad, predictions.bias.grad):
        assert gradient[:90].eq(1).all()
        assert not gradient[90:].any()
    assert model.decoder.get_input_embeddings().weight.grad is predictions.decoder.weight.grad


def test_a_bart_without_a_bias_in_its_files_has_none(tiny_bart_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_bart_dir)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["final_logits_bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    bias = load_head(tmp_path).bias_V
    assert bias is not None
    assert not bias.any()


def test_head_smaller_than_the_tokenizer_is_refused(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with pytest.raises(VocabMismatch, match="belongs to the model"):
        head_of(model, model.config.vocab_size + 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "t5", "bart"])
def test_load_head_reads_a_head_of_its_own_beside_the_embedding(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(f"tiny_{family}_dir"))
    is_t5 = family == "t5"  # its config says tied even where the file has both
    model.config.tie_word_embeddings = is_t5
    model.get_output_embeddings().weight = torch.nn.Parameter(
        torch.randn_like(head_of(model).weight_VH)
    )
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    head = load_head(tmp_path, 90)
    assert torch.equal(head.weight_VH, model.get_output_embeddings().weight[:90])
    assert not torch.equal(head.weight_VH, model.get_input_embeddings().weight[:90])


def test_a_folder_without_its_head_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama_dir / "config.json").read_bytes())
    with pytest.raises(UnsupportedModel, match="contains its LM head"):
        load_head(tmp_path)


def test_expected_rows_are_means_under_the_teacher(tiny_llama_dir: Path) -> None:
    head = head_of(AutoModelForCausalLM.from_pretrained(tiny_llama_dir))
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    p = torch.softmax(hidden @ head.weight_VH.T, dim=-1)
    expected = expected_rows(hidden, head)
    torch.testing.assert_close(expected.head_NH, p @ head.weight_VH, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        expected.neg_entropy_N, torch.xlogy(p, p).sum(-1), rtol=1e-4, atol=1e-5
    )
    assert not expected.head_NH.requires_grad
    assert torch.equal(expected.top_N, p.argmax(-1))


def test_top_rows_hold_the_likeliest_tokens_and_the_mass_of_the_others(
    tiny_llama_dir: Path,
) -> None:
    head = head_of(AutoModelForCausalLM.from_pretrained(tiny_llama_dir))
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    p = torch.softmax((hidden @ head.weight_VH.T).double(), dim=-1)
    expected, ids = p.topk(7, dim=-1)
    top = top_rows(hidden, head, 7, chunk_rows=2)
    assert torch.equal(top.ids_NK, ids)
    torch.testing.assert_close(top.log_p_NK.double().exp(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        top.log_rest_N.double().exp(), 1 - expected.sum(-1), rtol=1e-3, atol=1e-6
    )
    assert not top.log_p_NK.requires_grad


def test_the_rest_of_a_certain_teacher_is_small_but_has_a_logarithm() -> None:
    weight = torch.zeros(9, 2)
    weight[3] = 300.0
    top = top_rows(torch.ones(1, 2), Head(weight), 1)
    assert top.ids_NK.tolist() == [[3]]
    assert top.log_rest_N.item() == pytest.approx(-600 + math.log(8), rel=1e-6)
