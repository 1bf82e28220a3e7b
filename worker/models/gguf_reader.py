"""Converts a GGUF file to float32 weights and a fast tokenizer.

Unsupported files are refused, rather than converted to a model that answers slightly differently.
"""

import json
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from worker.errors import BrokenFile, UnsupportedModel, UnsupportedTokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
# Names of known pre-tokenizers of byte-level BPE. transformers converts them correctly, except
# `smollm`, which `load_gguf_tokenizer` repairs. Unknown names are refused, because transformers
# would convert them to a tokenizer that splits some texts differently.
BYTE_LEVEL_SPLITS = (
    "default",
    "gpt-2",
    "smollm",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "qwen2",
    "deepseek-r1-qwen",
)
DROPPED = ("quantization_config", "_name_or_path", "_model_name_or_path", "name_or_path")

VALUE_FORMATS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
MAX_ENTRIES = 100_000
Value = bool | int | float | str | None


@dataclass(frozen=True)
class GgufHeader:
    """Scalar metadata and tensor names of a GGUF file.

    Arrays, such as the vocabulary, have the value None.
    """

    metadata: dict[str, Value]
    tensors: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    @property
    def context_tokens(self) -> int | None:
        value = self.metadata.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) else None


class _Cursor:
    """Reads values one after the other; raises BrokenFile at the end of the file."""

    def __init__(self, content: mmap.mmap, name: str) -> None:
        self.content, self.name, self.position = content, name, 0

    def skip(self, num_bytes: int) -> int:
        start = self.position
        if num_bytes > len(self.content) - start:
            raise BrokenFile(
                f"{self.name} is truncated: {num_bytes} bytes are expected from byte {start}, but the file ends earlier"
            )
        self.position += num_bytes
        return start

    def number(self, form: str) -> Any:  # Any: what the format says
        return struct.unpack_from(form, self.content, self.skip(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        start = self.skip(length)
        return self.content[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int) -> Value:
        if kind in VALUE_FORMATS:
            number: Value = self.number(VALUE_FORMATS[kind])
            return number
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise BrokenFile(f"{self.name} has metadata of the unknown type {kind}")
        item, count = self.number("<I"), self.number("<Q")
        if item in VALUE_FORMATS:
            self.skip(count * struct.calcsize(VALUE_FORMATS[item]))
        elif item == STRING:
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            raise BrokenFile(f"{self.name} has an array of the unknown type {item}")
        return None


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the header and checks all its sizes against the file. Raises BrokenFile."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BrokenFile(f"{path.name} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            cursor = _Cursor(content, path.name)
            cursor.skip(4)
            version, num_tensors, num_entries = (
                cursor.number("<I"),
                cursor.number("<Q"),
                cursor.number("<Q"),
            )
            if version not in (2, 3) or max(num_tensors, num_entries) > MAX_ENTRIES:
                raise BrokenFile(
                    f"{path.name}: version {version} with {num_tensors} tensors and {num_entries} entries "
                    f"is not supported; supported are versions 2 and 3 with up to {MAX_ENTRIES} of each"
                )
            metadata = {
                cursor.text(): cursor.value(cursor.number("<I")) for _ in range(num_entries)
            }
            extents = [_tensor_extent(cursor) for _ in range(num_tensors)]
            alignment = metadata.get("general.alignment", 32)
            if type(alignment) is not int or not 1 <= alignment <= 2**20:
                raise BrokenFile(f"{path.name}: alignment {alignment!r} is invalid")
            data_start = -(-cursor.position // alignment) * alignment
            for name, end in extents:
                if data_start + end > len(content):
                    raise BrokenFile(
                        f"{path.name} is truncated: tensor {name[:100]!r} ends after the end of the file"
                    )
    return GgufHeader(metadata, tuple(name for name, _ in extents))


def _tensor_extent(cursor: _Cursor) -> tuple[str, int]:
    """Returns the name of the next tensor, and its end as an offset into the data section."""
    name, num_dimensions = cursor.text(), cursor.number("<I")
    if num_dimensions > 4:
        raise BrokenFile(
            f"{cursor.name}: tensor {name[:100]!r} has {num_dimensions} dimensions, at most 4 are supported"
        )
    num_elements = 1
    for _ in range(num_dimensions):
        num_elements *= cursor.number("<Q")
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise BrokenFile(
            f"{cursor.name}: tensor {name[:100]!r} has the unknown type {kind}"
        ) from error
    return name, offset + num_elements // block_elements * block_bytes


def check_gguf(path: Path) -> GgufHeader:
    """Returns the header of a GGUF file that can be converted.

    Raises BrokenFile, UnsupportedModel or UnsupportedTokenizer.
    """
    header = read_gguf_header(path)
    if header.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"GGUF architecture {header.architecture[:60]!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    kind, split = (
        header.metadata.get("tokenizer.ggml.model"),
        header.metadata.get("tokenizer.ggml.pre", "default"),
    )
    if kind not in ("gpt2", "llama"):
        raise UnsupportedTokenizer(
            f"GGUF tokenizer {str(kind)[:60]!r} is not supported; supported are gpt2 and llama"
        )
    if kind == "gpt2" and split not in BYTE_LEVEL_SPLITS:
        raise UnsupportedTokenizer(
            f"GGUF pre-tokenizer {str(split)[:60]!r} is not supported; supported are {', '.join(BYTE_LEVEL_SPLITS)}. "
            "Import the original safetensors folder instead"
        )
    _check_weights_are_read(header)
    return header


def _check_weights_are_read(header: GgufHeader) -> None:
    """Raises UnsupportedModel for features that transformers silently ignores.

    Without them, the converted model would give different logits.
    """
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in header.tensors:
        raise UnsupportedModel(
            "the GGUF file uses RoPE scaling, which is lost in the conversion; "
            "import the original safetensors folder instead"
        )
    if header.architecture == "llama" and any(
        re.search(r"(attn_\w+|ffn_\w+)\.bias$", n) for n in header.tensors
    ):
        raise UnsupportedModel(
            "the GGUF file has a llama model with biases, which are lost in the conversion; "
            "import the original safetensors folder instead"
        )


def load_gguf_tokenizer(path: Path, header: GgufHeader) -> Any:  # Any: transformers is untyped here
    """Loads the tokenizer of a GGUF file and repairs two errors in the conversion by transformers.

    The conversion drops the digit rule of `smollm` vocabularies. It also adds an unknown token
    for which the model has no embedding row.
    """
    loaded = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    state = json.loads(loaded.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    names = set(vocabulary if isinstance(vocabulary, dict) else (token for token, _ in vocabulary))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in names]
    backend = Tokenizer.from_str(json.dumps(state))
    if header.metadata.get("tokenizer.ggml.pre") == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    special = {
        name: getattr(loaded, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=header.context_tokens or loaded.model_max_length,
        **{name: token for name, token in special.items() if token in names},
    )
    tokenizer.chat_template = loaded.chat_template
    return tokenizer


def load_gguf_model(path: Path) -> tuple[Any, Any]:  # Any: transformers is untyped here
    """Returns the model as loaded by transformers, and a float32 model with the same weights.

    transformers treats the loaded model as quantised, although its weights are float32 by now. The
    other model is for saving and training. Both share the memory of the weights. Raises BrokenFile if
    weights are missing.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=_config(path),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    settings = {
        name: value for name, value in loaded.config.to_dict().items() if name not in DROPPED
    }
    with no_init_weights():
        plain = AutoModelForCausalLM.from_config(
            type(loaded.config).from_dict(settings), dtype=torch.float32
        )
    report = plain.load_state_dict(loaded.state_dict(), strict=False, assign=True)
    plain.tie_weights()
    lost = [name for name in report.missing_keys if not re.fullmatch(r"lm_head\.weight", name)]
    if (
        lost
        or report.unexpected_keys
        or (report.missing_keys and not plain.config.tie_word_embeddings)
    ):
        raise BrokenFile(
            f"{path.name} does not contain all weights of its architecture; missing: {', '.join(lost[:3])}"
        )
    plain.generation_config = loaded.generation_config
    return loaded, plain


def _config(path: Path) -> Any:  # Any: transformers is untyped here
    """Returns the configuration, with sizes from the file that transformers leaves at defaults."""
    header = read_gguf_header(path)
    config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if header.architecture == "gpt2":
        config.n_positions = header.context_tokens or config.n_positions
        config.n_inner = header.metadata.get("gpt2.feed_forward_length")
    if header.architecture == "qwen3":
        width = header.metadata.get("qwen3.attention.key_length")
        config.head_dim = width or config.hidden_size // config.num_attention_heads
    return config
