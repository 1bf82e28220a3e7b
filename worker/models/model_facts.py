"""Reads the facts that the API keeps about a model from its folder, without loading weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from app.contracts.architectures import HALVES
from app.contracts.messages import ChatCost, ModelFacts
from worker.errors import BrokenFile, MissingFile, UnsupportedModel
from worker.models.architectures import SUPPORTED, context_tokens, kind_of, layer_counts
from worker.models.artifact_checks import read_safetensors_header, weight_files
from worker.models.chat_templates import takes_tools

BUFFER = "final_logits_bias"  # a buffer that BART stores with its weights; not a parameter
PROBES = (
    "The capital of France is Paris.",
    "1. first\n\n2. second\n\n10. tenth, 3.14159 and 1234567",
    "    indented\tand  spaced   out\r\n\r\n",
    "don't we'll they've I'M",
    "naïve café, 蒸馏 の テスト, Привет, ∑≠∞ 🙂👩‍🚀",
    '{"json": [1, 2.5, null]} <|im_start|>user\nhi<|im_end|>\n<s></s><|endoftext|>',
)


def model_facts(folder: Path) -> ModelFacts:
    """Returns the facts of a model folder with config.json, safetensors and tokenizer.json.

    Raises UnsupportedModel, MissingFile or BrokenFile.
    """
    config = supported_config(folder)
    files = weight_files(folder)
    if not files:
        raise MissingFile("there are no safetensors weights in the model folder")
    tensors = [
        tensor
        for file in files
        for name, tensor in read_safetensors_header(file).items()
        if name != BUFFER
    ]
    tokenizer_hash = tokenizer_sha256(folder / "tokenizer.json")
    tokenizer = _tokenizer(folder) if has_chat_template(folder) else None
    family, writer = kind_of(config), writing_half(config)
    num_encoder_layers, num_layers = layer_counts(config)
    is_seq2seq = family == "seq2seq"
    return ModelFacts(
        architecture=config.model_type,
        family=family,
        num_layers=num_layers,
        num_encoder_layers=num_encoder_layers if is_seq2seq else None,
        num_decoder_layers=num_layers if is_seq2seq else None,
        hidden_size=writer.hidden_size,
        vocab_size=writer.vocab_size,
        context_tokens=context_tokens(config),
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        tokenizer_sha256=tokenizer_hash,
        has_chat_template=tokenizer is not None,
        takes_tools=tokenizer is not None and takes_tools(tokenizer.chat_template),
        chat_cost=None if tokenizer is None else chat_cost(tokenizer),
        weights_bytes=sum(file.stat().st_size for file in files),
        weights_sha256=_sha256_of_files(files),
    )


def writing_half(config: PretrainedConfig) -> Any:  # Any: transformers is untyped here
    """Returns the configuration of the part that has the LM head.

    It is the decoder of an EncoderDecoderModel, and the model's own configuration otherwise.
    """
    return config.decoder if config.model_type == "encoder-decoder" else config


def supported_config(folder: Path) -> Any:  # Any: transformers is untyped here
    """Reads and checks the configuration of a model folder.

    Raises UnsupportedModel for architectures and options that are not supported. Raises
    BrokenFile if the configuration cannot be read or its sizes are out of range.
    """
    document = json.loads((folder / "config.json").read_text())
    model_type = document.get("model_type")
    if model_type not in SUPPORTED:
        raise UnsupportedModel(
            f"architecture {str(model_type)[:60]!r} is not supported; supported are {', '.join(SUPPORTED)}"
        )
    halves = (
        [document.get(name) for name in ("encoder", "decoder")]
        if model_type == "encoder-decoder"
        else []
    )
    if not all(isinstance(half, dict) and half.get("model_type") in HALVES for half in halves):
        raise UnsupportedModel(
            f"the encoder and decoder of an encoder-decoder must be {', '.join(HALVES)}; these are not"
        )
    if any("quantization_config" in part for part in (document, *halves)):
        raise UnsupportedModel(
            "the weights are quantised; import the full-precision model, or a GGUF file"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        writer, num_layers = writing_half(config), layer_counts(config)
        sizes = (sum(num_layers), writer.hidden_size, writer.vocab_size, context_tokens(config))
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OSError,
        StrictDataclassError,
    ) as error:
        raise BrokenFile(
            f"config.json cannot be read as a {model_type} configuration: {error}"
        ) from error
    limits = (1024, 2**17, 2**22, 2**24)
    is_sound = all(
        isinstance(size, int) and 0 < size <= most for size, most in zip(sizes, limits, strict=True)
    )
    if not is_sound or min(num_layers) < (kind_of(config) == "seq2seq"):
        raise BrokenFile(
            f"config.json gives the sizes (layers, width, vocabulary, context) {sizes}; the limits are {limits}"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModel(
            "scale_attn_by_inverse_layer_idx is not supported: a layer's number changes its output"
        )
    return config


def tokenizer_sha256(path: Path) -> str:
    """Returns a hash of the behaviour of a tokenizer: its vocabulary, merges and some encodings.

    The hash does not depend on the library version that wrote the file.
    Raises MissingFile or BrokenFile.
    """
    if not path.exists():
        raise MissingFile("tokenizer.json is missing from the model folder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise BrokenFile(f"tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = json.loads(path.read_text())["model"]
    merges = [
        merge.split(" ") if isinstance(merge, str) else list(merge)
        for merge in model.get("merges", ())
    ]
    canonical = {
        "vocabulary": sorted(tokenizer.get_vocab(with_added_tokens=True).items()),
        "merges": merges,
        "encodings": [tokenizer.encode(probe, add_special_tokens=False).ids for probe in PROBES],
    }
    return hashlib.sha256(
        json.dumps(canonical, ensure_ascii=False, separators=(",", ":")).encode()
    ).hexdigest()


def has_chat_template(folder: Path) -> bool:
    """Returns whether the tokenizer of a model folder has a chat template."""
    path = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (
        path.exists() and bool(json.loads(path.read_text()).get("chat_template"))
    )


def chat_cost(tokenizer: Any) -> ChatCost | None:  # Any: transformers is untyped here
    """Returns the tokens that the chat template adds per message; None if it refuses such chats.

    This runs the template. For an untrusted model, call it inside `template_limits.bounded`.
    """

    def count(*roles: str, begins_answer: bool = True) -> int:
        """Returns the number of tokens of a chat with empty messages of these roles."""
        chat = [{"role": role, "content": ""} for role in roles]
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=begins_answer
        )
        return len(tokenizer.encode(text, add_special_tokens=False))

    try:
        first = count("user")
        assistant = count("user", "assistant") - first
        return ChatCost(
            first=first,
            end=count("user", "assistant", begins_answer=False) - first,
            user=count("user", "assistant", "user") - first - assistant,
            assistant=assistant,
            system=count("system", "user") - first,
        )
    except (TemplateError, ValueError, TypeError):
        return None


def _tokenizer(folder: Path) -> Any:  # Any: transformers is untyped here
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _sha256_of_files(files: list[Path]) -> str:
    """Returns the SHA-256 of a single file; for several files, that of their names and hashes."""
    hashes = []
    for file in files:
        with file.open("rb") as content:
            hashes.append(hashlib.file_digest(content, "sha256").hexdigest())
    if len(files) == 1:
        return hashes[0]
    lines = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, hashes, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
