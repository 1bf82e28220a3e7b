"""Which architectures a run can take, and what kind of model each is."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderModel,
    PretrainedConfig,
    PreTrainedModel,
)

from worker.errors import UnsupportedModel

ModelKind = Literal["causal", "seq2seq", "masked"]

CAUSAL = ("bloom", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3", "smollm3")
SEQ2SEQ = ("bart", "encoder-decoder", "t5")
MASKED = ("bert", "roberta")  # they have no next-token distribution, so they are teachers only
SUPPORTED = tuple(sorted((*CAUSAL, *SEQ2SEQ, *MASKED)))
HALVES = ("bert", "gpt2", "roberta")  # of an encoder-decoder
UNBOUNDED_CONTEXT = 2048  # of models whose positions have no end (T5, BLOOM)


def shape_of(config: PretrainedConfig) -> ModelKind:
    """The kind of model. Raises UnsupportedModel."""
    if config.model_type in CAUSAL:
        return "causal"
    if config.model_type in SEQ2SEQ:
        return "seq2seq"
    if config.model_type in MASKED:
        return "masked"
    raise UnsupportedModel(
        f"the model has architecture {config.model_type!r}; supported are {', '.join(SUPPORTED)}"
    )


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a supported model. Raises UnsupportedModel."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    shape_of(config)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModel(
            "scale_attn_by_inverse_layer_idx is not supported: a layer's number changes its output"
        )
    return config


def model_class(config: PretrainedConfig) -> Any:  # Any: transformers is untyped here
    """The auto class (or EncoderDecoderModel) that loads models of this kind."""
    if config.model_type == "encoder-decoder":
        return EncoderDecoderModel
    classes = {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "masked": AutoModelForMaskedLM,
    }
    return classes[shape_of(config)]


def bare_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of that configuration whose weights take no memory and hold nothing."""
    kind = model_class(config)
    with torch.device("meta"):
        is_pair = kind is EncoderDecoderModel  # the one class that no auto class makes
        model: PreTrainedModel = (
            kind(config) if is_pair else kind.from_config(config, trust_remote_code=False)
        )
    return model


def context_tokens(config: PretrainedConfig) -> int:
    """The longest sequence the positions allow; of an encoder-decoder, of the shorter half."""
    if config.model_type == "encoder-decoder":
        return min(context_tokens(config.encoder), context_tokens(config.decoder))
    positions = getattr(config, "max_position_embeddings", None) or UNBOUNDED_CONTEXT
    return int(positions) - (
        2 if config.model_type == "roberta" else 0
    )  # two of RoBERTa's hold no tokens


def layer_counts(config: PretrainedConfig) -> tuple[int, int]:
    """Layers of the encoder and of the decoder; of a causal or masked model 0 and all."""
    if config.model_type == "encoder-decoder":
        return int(config.encoder.num_hidden_layers), int(config.decoder.num_hidden_layers)
    if config.model_type == "t5":
        return int(config.num_layers), int(config.num_decoder_layers)
    if config.model_type == "bart":
        return int(config.encoder_layers), int(config.decoder_layers)
    return 0, int(config.num_hidden_layers)
