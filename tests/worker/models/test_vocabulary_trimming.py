"""A trimmed model writes the same text, with the kept tokens, and can still read any text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from app.contracts.architectures import distilled
from tests.tiny import save_tiny
from worker.distill.students.recipe import load_model
from worker.errors import UnsupportedModel
from worker.models.model_facts import model_facts
from worker.models.vocabulary_trimming import trim_vocabulary

TEXTS = ("The lantern keeper counts 12 jars.", "Who keeps the still?\n", "naïve café")
OTHER = "Quartz 9876 — 蒸馏, ∑ and\tzebra crossings"


def tokenizer_of(folder: Path) -> Any:  # Any: transformers is untyped here
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def num_tokens(folder: Path) -> int:
    """The tokens of the file: some classes of tokenizers add one of their own."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


@pytest.mark.parametrize("family", sorted(distilled("causal")))
def test_texts_of_the_task_keep_their_tokens_and_logits(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    before = tokenizer_of(source)
    encoded = [before(text).input_ids for text in TEXTS]
    used = {token for ids in encoded for token in ids}
    whole = load_model(source)
    with torch.no_grad():
        expected = [whole(torch.tensor([ids])).logits[0] for ids in encoded]

    num_kept = trim_vocabulary(load_model(source), source, used, tmp_path / "trimmed")

    after, model = tokenizer_of(tmp_path / "trimmed"), load_model(tmp_path / "trimmed")
    assert num_kept < num_tokens(source)
    assert num_kept == num_tokens(tmp_path / "trimmed")
    assert num_kept == model_facts(tmp_path / "trimmed").vocab_size
    assert after.eos_token == before.eos_token
    tokens = after.convert_ids_to_tokens(range(num_kept))
    kept = before.convert_tokens_to_ids(tokens)
    for text, ids, logits in zip(TEXTS, encoded, expected, strict=True):
        new_ids = after(text).input_ids
        assert after.convert_ids_to_tokens(new_ids) == before.convert_ids_to_tokens(ids)
        with torch.no_grad():
            torch.testing.assert_close(model(torch.tensor([new_ids])).logits[0], logits[:, kept])
    ends = model.generation_config.eos_token_id
    assert ends is None or after.convert_ids_to_tokens(ends) == before.eos_token
    decode = {"skip_special_tokens": True}
    assert after.decode(after(OTHER).input_ids, **decode) == before.decode(
        before(OTHER).input_ids, **decode
    )


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "t5")
    with pytest.raises(UnsupportedModel, match="only that of a causal model"):
        trim_vocabulary(load_model(source), source, {1, 2}, tmp_path / "trimmed")
