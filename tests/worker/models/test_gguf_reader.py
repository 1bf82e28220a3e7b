"""A GGUF file gives the logits of the model it was made from, and tokens split as its vocabulary was made."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker.memory_sink import MemorySink
from worker.errors import BrokenFile, UnsupportedModel, UnsupportedTokenizer, WorkerError
from worker.import_model import import_model
from worker.models.gguf_reader import check_gguf, read_gguf_header
from worker.protocol.import_spec import ImportSpec
from worker.protocol.run_lines import ResultLine

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp keeps the two halves of each rotary pair side by side."""
    rows, columns = weight.shape
    return (
        weight.view(num_heads, 2, rows // num_heads // 2, columns)
        .swapaxes(1, 2)
        .reshape(rows, columns)
    )


def write_gguf(
    path: Path,
    folder: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    quantise: bool = False,
) -> Path:
    """The tiny llama of the folder as a GGUF file, as llama.cpp's converter lays it out."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("a tiny one")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if i in tokenizer.all_special_ids else 1 for _, i in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        parts = name.split(".")
        if parts[1] == "layers":
            target = f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.weight"
        else:
            target = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]]
        if "q_proj" in name:
            weight = interleave(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = interleave(weight, config.num_key_value_heads)
        data = weight.numpy().astype(np.float32)
        if quantise and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama_dir)


def convert(path: Path, out: Path) -> Path:
    sink = MemorySink()
    import_model(ImportSpec(format="gguf", source_path=path), out, sink)
    result = sink.lines[-1]
    assert isinstance(result, ResultLine)
    return out / result.folder


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny_gguf, tmp_path_factory.mktemp("converted"))


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    return result


def test_the_checkpoint_gives_the_logits_of_the_original(
    converted: Path, tiny_llama_dir: Path
) -> None:
    tokens = torch.arange(3, 103).view(2, 50)
    torch.testing.assert_close(
        logits(converted, tokens), logits(tiny_llama_dir, tokens), rtol=1e-5, atol=1e-5
    )


def test_the_checkpoint_can_be_trained_and_saved_again(converted: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(converted)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)


def test_the_tokenizer_knows_its_vocabulary_limits_and_template(
    converted: Path, tiny_llama_dir: Path
) -> None:
    ours, original = (
        AutoTokenizer.from_pretrained(converted),
        AutoTokenizer.from_pretrained(tiny_llama_dir),
    )
    assert ours.get_vocab() == original.get_vocab()
    assert (ours.model_max_length, ours.eos_token, ours.chat_template) == (
        256,
        "<|im_end|>",
        original.chat_template,
    )
    for text in ("a lantern  keeps\n\nthe wind out", "naïve café 蒸馏", "x<|im_start|>y"):
        assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_stand_alone_so_that_lists_are_split_as_in_training(converted: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(converted)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("\n\n12. a")
    assert [piece for piece, _ in split] == ["ĊĊ", "1", "2", ".", "Ġa"]


def test_the_file_leaves_no_name_of_its_own_behind(converted: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        content = (converted / name).read_text()
        assert "gguf" not in content
        assert "a tiny one" not in content.lower()
        assert "name_or_path" not in content


def test_quantised_weights_become_dense(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = convert(
        write_gguf(tmp_path / "q8.gguf", tiny_llama_dir, quantise=True), tmp_path / "out"
    )
    tokens = torch.arange(3, 53).view(1, 50)
    ours, original = logits(folder, tokens), logits(tiny_llama_dir, tokens)
    assert 0 < (ours - original).abs().max() < 0.2 * original.abs().max()


def test_a_foreign_architecture_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'rwkv6'.*llama"):
        check_gguf(write_gguf(tmp_path / "x.gguf", tiny_llama_dir, architecture="rwkv6"))


def test_an_unknown_split_rule_is_refused_not_guessed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTokenizer, match="brand-new-bpe"):
        check_gguf(write_gguf(tmp_path / "x.gguf", tiny_llama_dir, pre="brand-new-bpe"))


def test_every_truncation_is_noticed(tiny_gguf: Path, tmp_path: Path) -> None:
    content = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (*range(4, 64), *range(64, len(content), len(content) // 97), len(content) - 32):
        path.write_bytes(content[:size])
        with pytest.raises(WorkerError):
            check_gguf(path)


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**60),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1),
        b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 1, 0, 1, b"t", 1, 2**62) + struct.pack("<IQ", 0, 0),
        b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 1, 0, 1, b"t", 1, 1) + struct.pack("<IQ", 77, 0),
        b"not a gguf file",
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(content + b"\0" * 64)
    with pytest.raises(BrokenFile):
        read_gguf_header(path)
