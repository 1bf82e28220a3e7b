"""Model families: how a shared-cursor batch calls each supported type of model.

Only this module of the serving package knows the differences between model types. The types are
those of app/contracts/architectures.py. tests/worker/serve/decoding/test_families.py has a tiny
model of each. While rows join and leave at random, its logits must be those of a plain forward
pass. Other types are refused, because they could give wrong results without an error.
"""

# N rows, Q tokens per row in this call, W columns of the window, S source tokens,
# H hidden size, V vocabulary
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from app.contracts.architectures import HALVES, served
from worker.cpu import LlamaDecoder, is_llama_like
from worker.models.architectures import num_positions
from worker.serve.errors import UnsupportedModel

CAUSAL, SEQ2SEQ, MASKED = served("causal"), served("seq2seq"), served("masked")
# Padded prompts become NaN in these models, which reaches real tokens as 0 * NaN.
ONE_PROMPT_AT_A_TIME = frozenset({"bloom"})

Model = Any  # transformers is untyped here
Config = Any


@dataclass(frozen=True)
class Call:
    """One forward pass: the new tokens of each row, their positions and their attention mask.

    The mask is None if every row attends to all columns, and the model is on a GPU.
    """

    tokens_NQ: Tensor
    mask_NW: Tensor | None
    positions_NQ: Tensor
    cache: Cache
    states_NSH: Tensor | None = None
    source_mask_NS: Tensor | None = None
    num_logits: int = 1  # logits are computed for so many last tokens of each row
    # First column that each row attends to, if it attends to all columns from there on.
    starts_N: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """Number of tokens that fit the context of a model.

    The prompt and answer of a decoder-only model share `tokens`. An encoder-decoder has
    `source_tokens` for the prompt and `tokens` for the answer.
    """

    tokens: int
    source_tokens: int | None = None

    def room_for(self, num_prompt: int) -> int:
        """Returns the largest number of answer tokens after a prompt of `num_prompt` tokens.

        The result is zero or negative if the prompt is too long.
        """
        if self.source_tokens is None:
            return self.tokens - num_prompt
        return self.tokens if num_prompt <= self.source_tokens else 0


@dataclass(frozen=True)
class Family:
    """Calling convention of one model. Context sizes are None if positions are unlimited."""

    # Returns the logits of the last token [N, V], or of the last K tokens [N, K, V] if K > 1.
    forward: Callable[[Model, Call], Tensor]
    context_tokens: int | None
    reads_column_order: bool = False  # True if it uses distances between columns, not positions
    can_pad_prompts: bool = True  # True if prompts of different lengths may share a prefill
    has_encoder: bool = False
    source_tokens: int | None = None
    start_token: int = 0  # first token of a decoder with an encoder
    cache_dtype: torch.dtype | None = None  # of keys and values; None keeps their own

    def encode(self, model: Model, tokens_NS: Tensor, mask_NS: Tensor) -> Tensor:
        """Returns the encoder's output [N, S, H], projected to the decoder's size."""
        states_NSH: Tensor = model.get_encoder()(input_ids=tokens_NS, attention_mask=mask_NS)[0]
        projection = getattr(model, "enc_to_dec_proj", None)
        return states_NSH if projection is None else projection(states_NSH)

    def context(self, max_tokens: int) -> Context:
        """Returns the context of the model, with each limit reduced to `max_tokens` if larger."""
        tokens = min(max_tokens, self.context_tokens or max_tokens)
        if not self.has_encoder:
            return Context(tokens)
        return Context(tokens, min(max_tokens, self.source_tokens or max_tokens))


def refuse_unlisted(config: Config) -> None:
    """Raises UnsupportedModel unless a shared-cursor batch is known to be exact for the model."""
    kind = config.model_type
    if kind in MASKED:
        raise UnsupportedModel(
            f"{kind} is an encoder and does not generate text; use it as a teacher"
        )
    if kind not in CAUSAL | SEQ2SEQ:
        raise UnsupportedModel(
            f"model type {kind!r} cannot be served; supported: {', '.join(sorted(CAUSAL | SEQ2SEQ))}"
        )
    if kind == "encoder-decoder" and not {
        config.encoder.model_type,
        config.decoder.model_type,
    } <= set(HALVES):
        raise UnsupportedModel(
            f"an encoder-decoder of {config.encoder.model_type!r} and {config.decoder.model_type!r} cannot be "
            f"served; supported halves: {', '.join(sorted(HALVES))}"
        )


def family_of(model: nn.Module, *, has_kernels: bool = True) -> Family:
    """Returns the calling convention of a model. Raises UnsupportedModel.

    Without `has_kernels`, it does not use the kernels for CPUs.
    """
    config: Config = model.config
    refuse_unlisted(config)
    if config.model_type in CAUSAL:
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        decoder = _llama_decoder(model) if has_kernels else None
        return Family(
            forward=decoder.call
            if decoder
            else _causal
            if takes_positions
            else _causal_without_positions,
            cache_dtype=decoder.cache_dtype if decoder else None,
            context_tokens=num_positions(config),
            can_pad_prompts=config.model_type not in ONE_PROMPT_AT_A_TIME,
            reads_column_order=_reads_column_order(config),
        )
    has_halves = config.model_type == "encoder-decoder"
    return Family(
        forward={"t5": _t5, "bart": _bart, "encoder-decoder": _halves}[config.model_type],
        context_tokens=num_positions(config.decoder if has_halves else config),
        has_encoder=True,
        source_tokens=num_positions(config.encoder if has_halves else config),
        start_token=_start_token(model),
    )


def _reads_column_order(config: Config) -> bool:
    # ALiBi and sliding windows count columns of the mask
    return config.model_type == "bloom" or getattr(config, "sliding_window", None) is not None


def _start_token(model: Model) -> int:
    for source in (getattr(model, "generation_config", None), model.config):
        token = getattr(source, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    raise UnsupportedModel(
        "the model's config has no decoder_start_token_id; add it to config.json"
    )


def _llama_decoder(model: Model) -> LlamaDecoder | None:
    # LlamaDecoder avoids Python overhead, which is known to limit decode steps on a CPU only
    if not is_llama_like(model) or next(model.parameters()).device.type != "cpu":
        return None
    return LlamaDecoder(model)


def _causal(model: Model, call: Call) -> Tensor:
    logits_NKV: Tensor = model(
        input_ids=call.tokens_NQ,
        attention_mask=call.mask_NW,
        position_ids=call.positions_NQ,
        cache=call.cache,
        use_cache=True,
        logits_to_keep=call.num_logits,
    ).logits
    return logits_NKV[:, -call.num_logits :].squeeze(1)


def _causal_without_positions(model: Model, call: Call) -> Tensor:
    logits_NKV: Tensor = model(
        input_ids=call.tokens_NQ,
        attention_mask=call.mask_NW,
        cache=call.cache,
        use_cache=True,
        logits_to_keep=call.num_logits,
    ).logits
    return logits_NKV[:, -call.num_logits :].squeeze(1)


def _t5(model: Model, call: Call) -> Tensor:
    # Positions are relative: the bias depends only on the distance between columns.
    logits_NQV: Tensor = model(
        decoder_input_ids=call.tokens_NQ,
        decoder_attention_mask=call.mask_NW,
        encoder_outputs=(call.states_NSH,),
        attention_mask=call.source_mask_NS,
        cache=call.cache,
        use_cache=True,
    ).logits
    return logits_NQV[:, -1]


def _bart(model: Model, call: Call) -> Tensor:
    def embed(table: Any, *_: object) -> Tensor:  # Any: a transformers embedding with an offset
        """Returns the embeddings of the positions of this call."""
        return nn.functional.embedding(call.positions_NQ + table.offset, table.weight)

    # BART would use the length of the cache as the position of every row.
    hook = model.get_decoder().embed_positions.register_forward_hook(embed)
    try:
        return _t5(model, call)
    finally:
        hook.remove()


def _halves(model: Model, call: Call) -> Tensor:
    # Calls the decoder directly: the model would project the encoder's output again.
    decoder, positions_NQ = model.decoder, call.positions_NQ
    if decoder.config.model_type == "roberta":
        pad = decoder.config.pad_token_id
        positions_NQ = torch.where(call.tokens_NQ == pad, pad, positions_NQ + pad + 1)
    logits_NQV: Tensor = decoder(
        input_ids=call.tokens_NQ,
        attention_mask=call.mask_NW,
        position_ids=positions_NQ,
        encoder_hidden_states=call.states_NSH,
        encoder_attention_mask=call.source_mask_NS,
        cache=call.cache,
        use_cache=True,
    ).logits
    return logits_NQV[:, -1]
