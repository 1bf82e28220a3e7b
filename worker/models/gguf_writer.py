"""Exports a model folder as one GGUF file for llama.cpp, with one tensor in memory at a time.

Models and tokenizers that llama.cpp would not run exactly are refused.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from safetensors import safe_open
from transformers import AutoConfig

from app.contracts.architectures import ARCHITECTURES
from worker.errors import BrokenFile, UnsupportedModel
from worker.models.gguf_vocabulary import Vocabulary, read_vocabulary

Kind = Literal["f16", "q8_0", "f32"]
Floats = npt.NDArray[np.float32]

# The GGUF architecture of each model type that can be exported.
ARCHITECTURE_OF = {
    row.model_type: gguf.MODEL_ARCH[row.gguf.upper()]
    for row in ARCHITECTURES.values()
    if row.gguf is not None
}
EXPORTABLE = tuple(ARCHITECTURE_OF)
KINDS: dict[Kind, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ROTATED_IN_PAIRS = (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.SMOLLM3)
SMOLLM3_ROPELESS_STEP = 4  # each 4th layer has no RoPE; the value is fixed in llama.cpp


@dataclass(frozen=True)
class ExportFacts:
    """Size of a written GGUF file."""

    bytes: int
    num_tensors: int


@dataclass(frozen=True)
class Tensor:
    """One tensor to export: its source in the checkpoint, and its entry in the GGUF file."""

    name: str
    source: str
    path: Path
    shape: tuple[int, ...]  # in the GGUF file
    kind: GGMLQuantizationType

    @property
    def bytes(self) -> int:
        block_elements, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(block_elements) * int(block_bytes)


def export_gguf(folder: Path, target: Path, *, kind: Kind) -> ExportFacts:
    """Writes the model of `folder` to `target`: matrices as `kind`, vectors in float32.

    Raises:
        UnsupportedModel: GGUF cannot express the model.
        UnsupportedTokenizer: GGUF cannot express the tokenizer.
        BrokenFile: Weights are missing, or too large for the dtype.
    """
    config, vocabulary = check_exportable(folder)
    architecture = ARCHITECTURE_OF[config.model_type]
    tensors = list(_plan(folder, config, architecture, KINDS[kind][0]))
    frequencies = _rope_frequencies(config)
    writer = GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        _add_settings(writer, config, architecture)
        writer.add_file_type(KINDS[kind][1])
        if kind == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        vocabulary.add_to(writer)
        if frequencies is not None:
            writer.add_tensor_info(
                "rope_freqs.weight", frequencies.shape, frequencies.dtype, frequencies.nbytes
            )
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if frequencies is not None:
            writer.write_tensor_data(frequencies)
        for tensor, values in zip(tensors, _read(tensors, config, architecture), strict=True):
            writer.write_tensor_data(quantize(values, tensor.kind))
    finally:
        writer.close()
    return ExportFacts(
        bytes=target.stat().st_size, num_tensors=len(tensors) + (frequencies is not None)
    )


def check_exportable(folder: Path) -> tuple[Any, Vocabulary]:  # Any: transformers is untyped here
    """Returns the configuration and vocabulary of a model that can be exported.

    Raises UnsupportedModel, UnsupportedTokenizer or BrokenFile.
    """
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    check_architecture(config.model_type)
    _check_settings(config)
    return config, read_vocabulary(folder, config.vocab_size)


def check_architecture(model_type: str) -> None:
    """Raises UnsupportedModel for an architecture that cannot be exported."""
    if model_type not in EXPORTABLE:
        raise UnsupportedModel(
            f"a model of architecture {model_type!r} cannot be exported as GGUF; "
            f"only {', '.join(EXPORTABLE)} can. Leave `export` empty and use the safetensors folder"
        )


def _check_settings(config: Any) -> None:  # Any: transformers is untyped here
    """Raises UnsupportedModel for settings that llama.cpp does not support."""
    faults = {}
    if config.model_type == "gpt2":
        # llama.cpp has only the tanh approximation of GELU for this architecture.
        faults["activation_function"] = config.activation_function not in (
            "gelu_new",
            "gelu_pytorch_tanh",
        )
        faults["scale_attn_weights"] = not config.scale_attn_weights
        faults["scale_attn_by_inverse_layer_idx"] = config.scale_attn_by_inverse_layer_idx
        faults["add_cross_attention"] = config.add_cross_attention
    else:
        rope = config.rope_parameters
        faults["hidden_act"] = config.hidden_act != "silu"
        # Only the llama architecture reads rope_freqs.
        is_llama = ARCHITECTURE_OF[config.model_type] == gguf.MODEL_ARCH.LLAMA
        stretches = ("default", "linear", "llama3") if is_llama else ("default", "linear")
        faults["rope_parameters"] = rope["rope_type"] not in stretches
        faults["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0) != 1.0
        faults["mlp_bias"] = config.model_type != "llama" and getattr(config, "mlp_bias", False)
        is_bias_known = config.model_type in ("llama", "qwen2")
        faults["attention_bias"] = not is_bias_known and getattr(config, "attention_bias", False)
    if config.model_type == "smollm3":
        step = SMOLLM3_ROPELESS_STEP
        wanted = [int((i + 1) % step != 0) for i in range(config.num_hidden_layers)]
        faults["no_rope_layers"] = config.no_rope_layers != wanted
    found = [name for name, is_faulty in faults.items() if is_faulty]
    if found:
        raise UnsupportedModel(
            f"the model's setting {found[0]!r} ({getattr(config, found[0], None)!r}) cannot be expressed in GGUF; "
            "leave `export` empty and use the safetensors folder"
        )


def _add_settings(
    writer: GGUFWriter, config: Any, architecture: gguf.MODEL_ARCH
) -> None:  # Any: transformers is untyped here
    num_heads = config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(num_heads)
    if architecture == gguf.MODEL_ARCH.GPT2:
        writer.add_context_length(config.n_positions)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    # GGUF has no attention window for these architectures. The context is limited to the window
    # instead, because attention is full up to that length.
    window = getattr(config, "sliding_window", None)
    writer.add_context_length(
        min(config.max_position_embeddings, window or config.max_position_embeddings)
    )
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_width = _head_width(config)
    writer.add_rope_dimension_count(head_width)
    if head_width * num_heads != config.hidden_size or config.model_type == "qwen3":
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _head_width(config: Any) -> int:  # Any: transformers is untyped here
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rope_frequencies(config: Any) -> Floats | None:  # Any: transformers is untyped here
    """Returns the divisors of the rotary frequencies for RoPE scaling of type llama3, else None."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    width = _head_width(config)
    frequencies = rope["rope_theta"] ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    turns = frequencies * rope["original_max_position_embeddings"] / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # Share of each frequency that is not scaled.
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: Floats = (1.0 / (kept + (1.0 - kept) / rope["factor"])).astype(np.float32)
    return divisors


def _plan(
    folder: Path, config: Any, architecture: gguf.MODEL_ARCH, wanted: GGMLQuantizationType
) -> Iterator[Tensor]:  # Any: transformers is untyped here
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for source in sorted(file.keys()):
                name = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise UnsupportedModel(f"the tensor {source!r} cannot be stored in a GGUF file")
                if name == "output.weight" and config.tie_word_embeddings:
                    continue
                shape = tuple(file.get_slice(source).get_shape())
                if _is_turned(source, config):
                    shape = shape[::-1]
                found.add(name)
                yield Tensor(name, source, path, shape, _kind_of(name, shape, wanted))
    heads = set() if config.tie_word_embeddings else {"output.weight"}
    if missing := ({"token_embd.weight", "output_norm.weight"} | heads) - found:
        raise BrokenFile(
            f"the folder's *.safetensors lack {sorted(missing)[0]}; the student is incomplete"
        )


def _kind_of(
    name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType
) -> GGMLQuantizationType:
    # llama.cpp needs vectors and position embeddings in float32.
    if len(shape) == 1 or name == "position_embd.weight":
        return GGMLQuantizationType.F32
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _is_turned(source: str, config: Any) -> bool:  # Any: transformers is untyped here
    """Returns whether the matrix must be transposed: GPT-2 stores the input dimension first."""
    layers = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return config.model_type == "gpt2" and source.endswith(layers)


def _read(
    tensors: list[Tensor], config: Any, architecture: gguf.MODEL_ARCH
) -> Iterator[Floats]:  # Any: transformers is untyped here
    """Yields the values of `tensors` in order, in float32 and in the layout of llama.cpp.

    Raises BrokenFile for values that do not fit into float16, unless the tensor stays float32.
    """
    with ExitStack() as stack:
        paths = sorted({tensor.path for tensor in tensors})
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
        for tensor in tensors:
            values = files[tensor.path].get_tensor(tensor.source).to(torch.float32).numpy()
            if _is_turned(tensor.source, config):
                values = np.ascontiguousarray(values.T)
            if architecture in ROTATED_IN_PAIRS and ".attn_q." in tensor.name:
                values = interleave(values, config.num_attention_heads)
            if architecture in ROTATED_IN_PAIRS and ".attn_k." in tensor.name:
                values = interleave(values, config.num_key_value_heads)
            limit = np.finfo(np.float16).max if tensor.kind != GGMLQuantizationType.F32 else np.inf
            if not np.abs(values).max(initial=0.0) < limit:
                raise BrokenFile(
                    f"{tensor.source} has values that float16 cannot represent; export as f32"
                )
            yield values


def interleave(values: Floats, num_heads: int) -> Floats:
    """Permutes the rows of each head from the RoPE layout of transformers to that of llama.cpp.

    transformers pairs row i of a head with row i + half; llama.cpp pairs adjacent rows.
    """
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
