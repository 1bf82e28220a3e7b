"""A GGUF file gives the logits, the text and the tokens of the folder it was made from."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import save_tiny
from worker.errors import BrokenFile, UnsupportedModel, UnsupportedTokenizer
from worker.models.gguf_reader import check_gguf, load_gguf_model, load_gguf_tokenizer
from worker.models.gguf_vocabulary import LLAMA3, QWEN2, read_vocabulary, split_of
from worker.models.gguf_writer import EXPORTABLE, Kind, export_gguf

PROMPT = "Ask a short question"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")  # what the independent reader knows


def save_varied(folder: Path, family: str, **settings: Any) -> Path:
    """A tiny model whose norms and biases are not the ones that every model starts with."""
    save_tiny(folder, family, num_layers=4)
    config = AutoConfig.from_pretrained(folder)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    return {family: save_varied(root / family, family) for family in FAMILIES}


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(tokens).logits
    return result


def greedy(model: Any, tokenizer: Any) -> list[int]:
    tokens = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=[],
    )
    ids: list[int] = made[0].tolist()
    return ids


def reread(folder: Path, kind: Kind) -> Any:  # Any: transformers is untyped here
    """The file as transformers' own GGUF reader takes it, which undoes llama.cpp's order of rows."""
    export_gguf(folder, folder / f"{kind}.gguf", kind=kind)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "mistral":  # a llama, in a GGUF file
        config = None
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=f"{kind}.gguf", config=config, dtype=torch.float32
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-6), ("f16", 3e-3), ("q8_0", 0.12)])
def test_the_file_gives_the_logits_of_the_folder(
    folders: dict[str, Path], family: str, kind: Kind, tolerance: float
) -> None:
    original = AutoModelForCausalLM.from_pretrained(folders[family])
    tokens = torch.arange(3, 103).view(2, 50)
    wanted, ours = logits(original, tokens), logits(reread(folders[family], kind), tokens)
    assert (ours - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_greedy_text_is_the_same(folders: dict[str, Path], family: str) -> None:
    original = AutoModelForCausalLM.from_pretrained(folders[family])
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    assert greedy(reread(folders[family], "f16"), tokenizer) == greedy(original, tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_importer_takes_it_back_whole(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    path = tmp_path / "alone.gguf"
    export_gguf(folders[family], path, kind="f32")
    header = check_gguf(path)
    original = AutoModelForCausalLM.from_pretrained(folders[family])
    tokens = torch.arange(3, 103).view(2, 50)
    _, plain = load_gguf_model(path)
    torch.testing.assert_close(
        logits(plain, tokens), logits(original, tokens), rtol=1e-5, atol=1e-5
    )
    ours, tokenizer = (
        load_gguf_tokenizer(path, header),
        AutoTokenizer.from_pretrained(folders[family]),
    )
    text = "<|im_start|>user\n1. a lantern  keeps 12\n\nthe wind out, naïve 蒸馏<|im_end|>"
    assert ours(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (ours.eos_token, ours.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"head_dim": 32},
    ],
    ids=["biases", "wide heads"],
)
def test_a_llama_of_another_make_keeps_its_logits(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_varied(tmp_path, "llama", **settings)
    tokens = torch.arange(3, 53).view(1, 50)
    original = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(reread(folder, "f32"), tokens), logits(original, tokens))


def test_stretched_positions_divide_the_frequencies_as_the_model_does(tmp_path: Path) -> None:
    folder = save_varied(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    export_gguf(folder, folder / "x.gguf", kind="f32")
    [divisors] = [
        t.data for t in gguf.GGUFReader(folder / "x.gguf").tensors if t.name == "rope_freqs.weight"
    ]
    model = AutoModelForCausalLM.from_pretrained(folder)
    width = len(divisors) * 2
    plain = 10000.0 ** (-np.arange(0, width, 2) / width)
    np.testing.assert_allclose(plain / divisors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)


def test_the_importer_refuses_what_it_would_lose(tmp_path: Path) -> None:
    folder = save_varied(tmp_path / "a", "llama", rope_parameters=LLAMA3_ROPE)
    export_gguf(folder, folder / "x.gguf", kind="f32")
    with pytest.raises(UnsupportedModel, match="uses RoPE scaling"):
        check_gguf(folder / "x.gguf")
    folder = save_varied(tmp_path / "b", "llama", attention_bias=True)
    export_gguf(folder, folder / "x.gguf", kind="f32")
    with pytest.raises(UnsupportedModel, match="biases"):
        check_gguf(folder / "x.gguf")


def test_rows_without_a_token_are_named_and_unused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    num_tokens = len(AutoTokenizer.from_pretrained(folder))
    vocabulary = read_vocabulary(folder, num_tokens + 3)
    assert vocabulary.tokens[num_tokens:] == [f"[PAD{num_tokens + i}]" for i in range(3)]
    assert vocabulary.types[num_tokens:] == [int(gguf.TokenType.UNUSED)] * 3
    with pytest.raises(BrokenFile, match="only 10 embedding rows"):
        read_vocabulary(folder, 10)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    assert "opt" not in EXPORTABLE
    with pytest.raises(UnsupportedModel, match=r"'opt' cannot be exported.*llama"):
        export_gguf(save_tiny(tmp_path, "opt"), tmp_path / "x.gguf", kind="f16")
    assert not (tmp_path / "x.gguf").exists()


def test_settings_without_a_place_in_the_file_are_refused(tmp_path: Path) -> None:
    folder = save_varied(tmp_path / "a", "gpt2", activation_function="relu")
    with pytest.raises(UnsupportedModel, match=r"activation_function.*relu"):
        export_gguf(folder, tmp_path / "x.gguf", kind="f16")
    folder = save_varied(tmp_path / "b", "smollm3", no_rope_layers=[1, 1, 1, 1])
    with pytest.raises(UnsupportedModel, match="no_rope_layers"):
        export_gguf(folder, tmp_path / "x.gguf", kind="f16")
    folder = save_varied(tmp_path / "c", "smollm3", rope_parameters=LLAMA3_ROPE)
    with pytest.raises(UnsupportedModel, match="rope_parameters"):
        export_gguf(folder, tmp_path / "x.gguf", kind="f16")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(BrokenFile, match=r"layers\.1\.mlp\.up_proj.*float16"):
        export_gguf(folder, tmp_path / "x.gguf", kind="f16")
    export_gguf(folder, tmp_path / "x.gguf", kind="f32")


def test_the_rule_that_splits_text_is_told_by_its_steps() -> None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(*steps: Any, ignore_merges: bool = False, normalizer: Any = None) -> str:
        backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
        if normalizer is not None:
            backend.normalizer = normalizer
        return split_of(json.loads(backend.to_str()))

    def by(rule: str) -> Any:
        return pre_tokenizers.Split(Regex(rule), "isolated")

    assert split(plain) == "gpt-2"
    assert split(pre_tokenizers.Digits(individual_digits=True), plain) == "smollm"
    assert split(by(QWEN2), bare, normalizer=normalizers.NFC()) == "qwen2"
    assert split(by(LLAMA3), bare, ignore_merges=True) == "llama-bpe"
    assert split(by(LLAMA3), bare) == "smaug-bpe"
    for strange in ([bare], [pre_tokenizers.Whitespace(), plain], [by(r"\w+"), bare]):
        with pytest.raises(UnsupportedTokenizer, match="does not support"):
            split(*strange)
    with pytest.raises(UnsupportedTokenizer):
        split(plain, normalizer=normalizers.Lowercase())


def test_a_sentencepiece_vocabulary_keeps_the_order_of_its_merges(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "c", "ab", "bc", "▁a", "abc"]
    merges = [("b", "c"), ("▁", "a"), ("a", "b"), ("a", "bc")]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, len(pieces))
    assert (vocabulary.model, vocabulary.is_space_prefixed, vocabulary.is_bos_added) == (
        "llama",
        True,
        False,
    )
    kinds = gguf.TokenType
    assert vocabulary.types[:5] == [
        kinds.UNKNOWN,
        kinds.CONTROL,
        kinds.CONTROL,
        kinds.BYTE,
        kinds.NORMAL,
    ]
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores["bc"] > scores["▁a"] > scores["ab"] > scores["abc"] > scores["b"]
