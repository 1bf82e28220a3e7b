"""Kinds, classes and sizes of supported models, read from their configs.

The table of architectures is in app/contracts/architectures.py.
"""

from pathlib import Path
from typing import Any

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

from app.contracts.architectures import ARCHITECTURES, UNBOUNDED_CONTEXT, distilled
from app.contracts.messages import ModelKind
from worker.errors import UnsupportedModel
from worker.models.attention_masks import never_read_masks

CAUSAL, SEQ2SEQ, MASKED = distilled("causal"), distilled("seq2seq"), distilled("masked")
SUPPORTED = tuple(sorted((*CAUSAL, *SEQ2SEQ, *MASKED)))

never_read_masks()  # all code that runs a model imports this module


def kind_of(config: PretrainedConfig) -> ModelKind:
    """Returns the kind of the model. Raises UnsupportedModel for an unknown architecture."""
    known = ARCHITECTURES.get(config.model_type)
    if known is not None and known.is_distilled:
        return known.kind
    raise UnsupportedModel(
        f"the model has architecture {config.model_type!r}; supported are {', '.join(SUPPORTED)}"
    )


def read_config(folder: Path) -> PretrainedConfig:
    """Reads the configuration of a model folder. Raises UnsupportedModel."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    kind_of(config)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModel(
            "scale_attn_by_inverse_layer_idx is not supported: a layer's number changes its output"
        )
    return config


def model_class(config: PretrainedConfig) -> Any:  # Any: transformers is untyped here
    """Returns the auto class (or EncoderDecoderModel) that loads models of this kind."""
    if config.model_type == "encoder-decoder":
        return EncoderDecoderModel
    classes = {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "masked": AutoModelForMaskedLM,
    }
    return classes[kind_of(config)]


def bare_model(config: PretrainedConfig) -> PreTrainedModel:
    """Creates a model on the meta device: its weights have shapes, but no memory and no values."""
    kind = model_class(config)
    with torch.device("meta"):
        is_pair = kind is EncoderDecoderModel  # not an auto class, so it has no `from_config`
        model: PreTrainedModel = (
            kind(config) if is_pair else kind.from_config(config, trust_remote_code=False)
        )
    return model


def context_tokens(config: PretrainedConfig) -> int:
    """Returns the longest sequence that the positions allow, in tokens.

    For an EncoderDecoderModel it is the smaller limit of encoder and decoder.
    """
    if config.model_type == "encoder-decoder":
        return min(context_tokens(config.encoder), context_tokens(config.decoder))
    return num_positions(config) or UNBOUNDED_CONTEXT


def num_positions(config: PretrainedConfig) -> int | None:
    """Returns the number of positions of a model, or of one half of an encoder-decoder.

    None means that there is no limit. A model with LongRoPE (Phi-3, Phi-4) counts with the length
    of its first training: beyond it, the angles of all tokens change with the longest row.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        first = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", positions
        )
        positions = min(positions, first)
    # RoBERTa's positions begin after the padding index.
    return int(positions) - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)


def layer_counts(config: PretrainedConfig) -> tuple[int, int]:
    """Returns the number of encoder layers and of decoder layers.

    A causal or masked model counts as 0 encoder layers; all its layers are in the second number.
    """
    if config.model_type == "encoder-decoder":
        return int(config.encoder.num_hidden_layers), int(config.decoder.num_hidden_layers)
    if config.model_type == "t5":
        return int(config.num_layers), int(config.num_decoder_layers)
    if config.model_type == "bart":
        return int(config.encoder_layers), int(config.decoder_layers)
    return 0, int(config.num_hidden_layers)
