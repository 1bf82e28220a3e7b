"""Facts are those of the model itself, and one tokenizer has one hash."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig

from app.contracts.messages import ModelFacts
from tests.tiny import save_tiny
from worker.errors import BrokenFile, MissingFile, UnsupportedModel
from worker.models.architectures import context_tokens, model_class, read_config
from worker.models.model_facts import model_facts, tokenizer_sha256


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "opt", "gpt_neox", "t5", "bart", "bert", "roberta"]
)
def test_facts_agree_with_the_loaded_model(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}_dir")
    facts = model_facts(folder)
    model = model_class(read_config(folder)).from_pretrained(folder)
    assert facts.architecture == family
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert (facts.num_layers, facts.hidden_size) == (
        model.config.num_hidden_layers,
        model.config.hidden_size,
    )
    assert (facts.vocab_size, facts.context_tokens) == (
        model.config.vocab_size,
        2048 if family == "t5" else 256,
    )
    assert facts.has_chat_template == (family in ("llama", "gpt2", "opt", "gpt_neox"))
    weights = (folder / "model.safetensors").read_bytes()
    assert (facts.weights_bytes, facts.weights_sha256) == (
        len(weights),
        hashlib.sha256(weights).hexdigest(),
    )


def test_facts_of_an_encoder_decoder_speak_of_the_half_that_writes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "pair", "encoder-decoder", num_layers=3)
    config = json.loads((folder / "config.json").read_text())
    config["decoder"] |= {"num_hidden_layers": 2, "vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    facts = model_facts(folder)
    assert (facts.family, facts.num_encoder_layers, facts.num_decoder_layers) == ("seq2seq", 3, 2)
    assert (facts.num_layers, facts.vocab_size, facts.hidden_size) == (2, 300, 64)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama", "causal"),
        ("bloom", "causal"),
        ("t5", "seq2seq"),
        ("bert2bert", "seq2seq"),
        ("roberta", "masked"),
    ],
)
def test_every_model_is_of_one_of_three_families(
    name: str, family: str, request: pytest.FixtureRequest
) -> None:
    facts = model_facts(request.getfixturevalue(f"tiny_{name}_dir"))
    assert facts.family == family
    assert (facts.num_encoder_layers is None) == (family != "seq2seq")


def test_facts_kept_before_there_were_families_are_still_read(tiny_llama_dir: Path) -> None:
    facts = model_facts(tiny_llama_dir)
    old = facts.model_dump(
        mode="json", exclude={"family", "num_encoder_layers", "num_decoder_layers"}
    )
    assert ModelFacts.model_validate(old) == facts


def test_an_encoder_decoder_of_other_halves_is_refused(
    tiny_bert2bert_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bert2bert_dir, tmp_path / "pair"))
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", encoder=config["encoder"] | {"model_type": "vit"})
    with pytest.raises(UnsupportedModel, match=r"bert, gpt2, roberta"):
        model_facts(folder)
    edit(
        folder / "config.json",
        encoder=config["encoder"] | {"quantization_config": {"quant_method": "gptq"}},
    )
    with pytest.raises(UnsupportedModel, match="quantised"):
        model_facts(folder)


def test_a_layer_that_counts_its_own_number_is_refused(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_gpt2_dir, tmp_path / "model"))
    edit(folder / "config.json", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedModel, match="inverse"):
        model_facts(folder)


def test_two_models_with_one_tokenizer_have_one_tokenizer_hash(
    tiny_llama_dir: Path, tiny_gpt2_dir: Path
) -> None:
    assert (
        model_facts(tiny_llama_dir).tokenizer_sha256 == model_facts(tiny_gpt2_dir).tokenizer_sha256
    )


def test_the_hash_is_the_same_for_the_old_spelling_of_merges_and_another_layout(
    folder: Path,
) -> None:
    path = folder / "tokenizer.json"
    before = tokenizer_sha256(path)
    document = json.loads(path.read_text())
    merges = document["model"]["merges"]
    assert isinstance(merges[0], list)
    document["model"]["merges"] = [" ".join(merge) for merge in merges]
    document["truncation"] = {
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    path.write_text(json.dumps(document, indent=1))
    assert tokenizer_sha256(path) == before


def test_another_merge_order_or_another_split_changes_the_hash(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = path.read_text()
    hashes = {tokenizer_sha256(path)}
    document = json.loads(content)
    document["model"]["merges"].reverse()
    path.write_text(json.dumps(document))
    hashes.add(tokenizer_sha256(path))
    document = json.loads(content)
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, document["pre_tokenizer"]],
    }
    path.write_text(json.dumps(document))
    hashes.add(tokenizer_sha256(path))
    tokenizer = Tokenizer.from_str(content)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(path))
    hashes.add(tokenizer_sha256(path))
    assert len(hashes) == 4


def test_an_unknown_family_is_refused_and_the_known_ones_are_named(folder: Path) -> None:
    edit(folder / "config.json", model_type="mamba")
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*gpt2, gpt_neox, granite, llama"):
        model_facts(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModel, match="quantised"):
        model_facts(folder)


@pytest.mark.parametrize(
    "size", [{"num_hidden_layers": 10**6}, {"vocab_size": -1}, {"hidden_size": "many"}]
)
def test_sizes_that_make_no_sense_are_refused(folder: Path, size: dict[str, object]) -> None:
    edit(folder / "config.json", **size)
    with pytest.raises(BrokenFile):
        model_facts(folder)


def test_missing_parts_are_named(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "elsewhere")
    with pytest.raises(MissingFile, match=r"tokenizer\.json"):
        model_facts(folder)
    (folder / "elsewhere").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFile, match="safetensors"):
        model_facts(folder)


def test_a_model_with_longrope_is_used_up_to_the_length_of_its_first_training() -> None:
    factors = [1.0] * 8
    config = AutoConfig.for_model(
        "phi3",
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": factors,
            "long_factor": factors,
        },
    )
    assert context_tokens(config) == 4096
