from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from app.contracts.distillation import FreshConfig
from tests.tiny import tiny_tokenizer
from worker.distill.students.fresh import CLASSES, build_fresh, fresh_config
from worker.distill.students.recipe import load_model, num_parameters
from worker.errors import InvalidStudent
from worker.models.architectures import layer_counts

KINDS = ("chat", "roberta", "wordpiece", "unigram")


def sizes(family: str, **changes: Any) -> FreshConfig:  # Any: sizes of every kind
    small = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_positions": 64}
    return FreshConfig.model_validate({"family": family, **small, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CLASSES)
def test_a_saved_student_generates_as_it_was_built(family: str, kind: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(kind)
    student: Any = build_fresh(fresh_config(sizes(family), tokenizer), seed=0)
    student.save_pretrained(tmp_path)
    loaded: Any = load_model(tmp_path)
    assert loaded.config.vocab_size == len(tokenizer)
    prompt = tokenizer(["the still is warm"], return_tensors="pt", return_token_type_ids=False)
    made = [
        model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        for model in (student, loaded)
    ]
    assert torch.equal(*made)
    start_tokens = 1 if layer_counts(student.config)[0] else prompt["input_ids"].shape[1]
    assert made[0].shape[1] == start_tokens + 6


@pytest.mark.parametrize("family", CLASSES)
def test_a_student_stops_at_the_end_token(family: str) -> None:
    tokenizer = tiny_tokenizer("wordpiece")
    student: Any = build_fresh(fresh_config(sizes(family), tokenizer), seed=0)
    assert (
        student.generation_config.eos_token_id
        == tokenizer.sep_token_id
        == student.config.eos_token_id
    )
    assert (
        student.generation_config.pad_token_id
        == tokenizer.pad_token_id
        == student.config.pad_token_id
    )
    if layer_counts(student.config)[0]:
        start = student.generation_config.decoder_start_token_id
        assert start == tokenizer.cls_token_id == student.config.decoder_start_token_id


def test_a_t5_tokenizer_starts_decoding_at_its_padding() -> None:
    config: Any = fresh_config(sizes("t5"), tiny_tokenizer("unigram"))
    assert (config.decoder_start_token_id, config.pad_token_id, config.eos_token_id) == (0, 0, 1)


# which goes by its width on its own
@pytest.mark.parametrize("family", sorted(set(CLASSES) - {"t5"}))
@pytest.mark.parametrize(("hidden_size", "spread"), [(32, 0.098), (192, 0.04)])
def test_first_weights_are_wider_apart_in_narrow_students(
    family: str, hidden_size: int, spread: float
) -> None:
    student = build_fresh(
        fresh_config(sizes(family, hidden_size=hidden_size), tiny_tokenizer()), seed=0
    )
    weights: Any = student.get_input_embeddings().weight
    assert weights.std().item() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("family", CLASSES)
def test_the_seed_decides_the_weights_and_nothing_else(family: str) -> None:
    config = fresh_config(sizes(family), tiny_tokenizer())
    before = torch.get_rng_state()
    one, same, other = (build_fresh(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", CLASSES)
def test_the_sizes_are_those_asked_for(family: str) -> None:
    student = build_fresh(fresh_config(sizes(family), tiny_tokenizer()), seed=0)
    assert student.get_output_embeddings().weight.shape == (len(tiny_tokenizer()), 32)
    assert layer_counts(student.config)[1] == 3
    assert not student.training
    tied = num_parameters(student) < sum(w.numel() for w in student.state_dict().values())
    assert tied


@pytest.mark.parametrize("family", ["t5", "encoder-decoder"])
def test_an_encoder_and_a_decoder_may_differ_in_depth(family: str) -> None:
    wanted = sizes(family, num_encoder_layers=4, num_decoder_layers=1)
    student = build_fresh(fresh_config(wanted, tiny_tokenizer("wordpiece")), seed=0)
    assert layer_counts(student.config) == (4, 1)


@pytest.mark.parametrize("family", CLASSES)
def test_a_fresh_student_drops_nothing_out(family: str) -> None:
    student: Any = build_fresh(fresh_config(sizes(family), tiny_tokenizer()), seed=0).train()
    tokens_BT = torch.arange(3, 23).view(2, 10)
    inputs = {"input_ids": tokens_BT}
    if layer_counts(student.config)[0]:
        inputs["decoder_input_ids"] = tokens_BT
    with torch.no_grad():
        first, second = student(**inputs).logits, student(**inputs).logits
    assert torch.equal(first, second)


def test_a_wider_vocabulary_than_the_tokenizers_is_given() -> None:
    config: Any = fresh_config(sizes("gpt2", vocab_size=512), tiny_tokenizer())
    assert config.vocab_size == 512


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"vocab_size": 300}, r"vocab_size is 300.*384 token ids"),
        ("llama", {"hidden_size": 36, "num_heads": 4}, "even head size"),
        ("bloom", {"intermediate_size": 100}, "always 4 x hidden_size"),
    ],
)
def test_impossible_sizes_are_refused(family: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidStudent, match=message):
        fresh_config(sizes(family, **changes), tiny_tokenizer())


def test_ids_that_a_tokenizer_leaves_out_have_rows_too() -> None:
    pieces = {"<s>": 0, "a": 1, "b": 9}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(pieces, [])), eos_token="<s>"
    )
    assert fresh_config(sizes("gpt2"), tokenizer).vocab_size == 10


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InvalidStudent, match="no end token"):
        fresh_config(sizes("gpt2"), tokenizer)
