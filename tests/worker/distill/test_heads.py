"""Heads taken from models and from folders."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from worker.distill.errors import UnsupportedModel, VocabMismatch
from worker.distill.heads import expected_rows, head_of, load_head


@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_head_of_a_model_makes_its_logits(folder: str, request: pytest.FixtureRequest) -> None:
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(folder))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(hidden @ head_of(model).weight_VH.T, expected)


def test_head_smaller_than_the_tokenizer_is_refused(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with pytest.raises(VocabMismatch, match="belongs to the model"):
        head_of(model, model.config.vocab_size + 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_load_head_reads_the_head_that_the_model_has(
    folder: str, tied: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(folder))
    if not tied:
        model.config.tie_word_embeddings = False
        model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(head_of(model).weight_VH))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    head = load_head(tmp_path, 300)
    assert torch.equal(head.weight_VH, loaded.get_output_embeddings().weight[:300])
    assert torch.equal(head.weight_VH, model.get_output_embeddings().weight[:300])


def test_a_folder_without_its_head_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama_dir / "config.json").read_bytes())
    with pytest.raises(UnsupportedModel, match="holds its head"):
        load_head(tmp_path)


def test_expected_rows_are_means_under_the_teacher(tiny_llama_dir: Path) -> None:
    head = head_of(AutoModelForCausalLM.from_pretrained(tiny_llama_dir))
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    p = torch.softmax(hidden @ head.weight_VH.T, dim=-1)
    expected = expected_rows(hidden, head)
    torch.testing.assert_close(expected.head_NH, p @ head.weight_VH, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected.neg_entropy_N, torch.xlogy(p, p).sum(-1), rtol=1e-4, atol=1e-5)
    assert not expected.head_NH.requires_grad
    assert torch.equal(expected.top_N, p.argmax(-1))
