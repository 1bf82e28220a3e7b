"""Builds students with random weights from sizes, a tokenizer and a seed."""

from collections.abc import Callable

import torch
from transformers import (
    BertConfig,
    BloomConfig,
    BloomForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from app.contracts.distillation import FreshConfig
from worker.errors import InvalidStudent
from worker.models.vocabulary import num_token_ids

CLASSES: dict[str, type[PreTrainedModel]] = {
    "bloom": BloomForCausalLM,
    "encoder-decoder": EncoderDecoderModel,
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
    "t5": T5ForConditionalGeneration,
}
Ids = dict[str, int | None]


def fresh_config(sizes: FreshConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Returns the configuration of a model with these sizes.

    It has no dropout, and its head is tied to the embedding. The special tokens are the
    tokenizer's, and so is the vocabulary size unless it is given.
    Raises InvalidStudent if the sizes or the tokenizer are unsuitable.
    """
    num_ids = num_token_ids(tokenizer)
    if sizes.vocab_size is not None and sizes.vocab_size < num_ids:
        raise InvalidStudent(
            f"student.config.vocab_size is {sizes.vocab_size}, but the tokenizer has {num_ids} token ids; "
            "leave vocab_size out or set it to at least that number"
        )
    makers: dict[str, Callable[[FreshConfig, int, Ids], PretrainedConfig]] = {
        "bloom": _bloom,
        "encoder-decoder": _encoder_decoder,
        "gpt2": _gpt2,
        "llama": _llama,
        "t5": _t5,
    }
    return makers[sizes.family](sizes, sizes.vocab_size or num_ids, special_ids(tokenizer))


def build_fresh(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """Returns a model with random weights, in float32 and eval mode.

    The weights depend only on the configuration and the seed. The global random state is preserved.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLASSES[config.model_type](config)
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    )
    return model.eval()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Returns the special token ids for a configuration.

    The separator and the classification token replace missing end and start tokens, as in BERT.
    Raises InvalidStudent if there is no end token.
    """
    end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if end is None:
        raise InvalidStudent(
            "the tokenizer has no end token, so a student could never stop; add an eos_token to the tokenizer"
        )
    start = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
    return {
        "eos_token_id": end,
        "pad_token_id": _first(tokenizer.pad_token_id, end),
        "bos_token_id": start,
    }


def _first(*ids: int | None) -> int | None:
    return next((token for token in ids if token is not None), None)


def _gpt2(sizes: FreshConfig, num_tokens: int, ids: Ids) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=num_tokens,
        n_embd=sizes.hidden_size,
        n_layer=sizes.num_layers,
        n_head=sizes.num_heads,
        n_inner=sizes.intermediate_size,
        n_positions=sizes.max_positions,
        initializer_range=_spread(sizes),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **ids,
    )


def _llama(sizes: FreshConfig, num_tokens: int, ids: Ids) -> PretrainedConfig:
    if sizes.hidden_size // sizes.num_heads % 2:
        raise InvalidStudent(
            f"rotary position embeddings need an even head size, not {sizes.hidden_size // sizes.num_heads}; change "
            "student.config.hidden_size or num_heads"
        )
    return LlamaConfig(
        vocab_size=num_tokens,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size or _gated_size(sizes.hidden_size),
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        max_position_embeddings=sizes.max_positions,
        initializer_range=_spread(sizes),
        tie_word_embeddings=True,
        **ids,
    )


def _bloom(sizes: FreshConfig, num_tokens: int, ids: Ids) -> PretrainedConfig:
    if sizes.intermediate_size not in (None, 4 * sizes.hidden_size):
        raise InvalidStudent(
            "bloom's intermediate size is always 4 x hidden_size; leave student.config.intermediate_size out"
        )
    return BloomConfig(
        vocab_size=num_tokens,
        hidden_size=sizes.hidden_size,
        n_layer=sizes.num_layers,
        n_head=sizes.num_heads,
        initializer_range=_spread(sizes),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **ids,
    )


def _t5(sizes: FreshConfig, num_tokens: int, ids: Ids) -> PretrainedConfig:
    return T5Config(
        vocab_size=num_tokens,
        d_model=sizes.hidden_size,
        d_kv=sizes.hidden_size // sizes.num_heads,
        d_ff=sizes.intermediate_size or _gated_size(sizes.hidden_size),
        num_layers=sizes.num_encoder_layers or sizes.num_layers,
        num_decoder_layers=sizes.num_decoder_layers or sizes.num_layers,
        num_heads=sizes.num_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=_decoder_start(ids),
        **ids,
    )


def _encoder_decoder(sizes: FreshConfig, num_tokens: int, ids: Ids) -> PretrainedConfig:
    def half(num_layers: int | None, **role: bool) -> PretrainedConfig:
        """Returns the configuration of the encoder or of the decoder."""
        return BertConfig(
            vocab_size=num_tokens,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=num_layers or sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.intermediate_size or 4 * sizes.hidden_size,
            max_position_embeddings=sizes.max_positions,
            initializer_range=_spread(sizes),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **ids,
            **role,
        )

    return EncoderDecoderConfig.from_encoder_decoder_configs(
        half(sizes.num_encoder_layers),
        half(sizes.num_decoder_layers, is_decoder=True, add_cross_attention=True),
        vocab_size=num_tokens,
        decoder_start_token_id=_decoder_start(ids),
        **ids,
    )


def _decoder_start(ids: Ids) -> int | None:
    return _first(ids["bos_token_id"], ids["pad_token_id"])


def _spread(sizes: FreshConfig) -> float:
    """Returns the standard deviation of the initial weights.

    It is 0.02 at GPT-2's width of 768, and larger for narrower models. With 0.02 a narrow model
    would begin with flat attention, and learn slowly at first.
    """
    return float(0.02 * (768 / sizes.hidden_size) ** 0.5)


def _gated_size(hidden_size: int) -> int:
    """Returns the intermediate size of a gated MLP: two thirds of 4 x hidden_size, in steps of 16.

    A gated MLP has three matrices and a plain one has two, so both have about as many parameters.
    """
    return max(16, 8 * hidden_size // 3 // 16 * 16)
