"""What differs between model families; the only file that knows model types.

A family is listed once its tiny model gives the logits of a plain forward pass under random joins and
leaves (tests/worker/serve/decoding/test_families.py). Unlisted ones are refused: they fail silently, not loudly.
"""

# N rows, Q tokens a row in this call, W columns of the window, S source tokens, H hidden size, V vocabulary
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from worker.cpu.llama_decoder import LlamaDecoder, is_lean
from worker.serve.errors import UnsupportedModel

CAUSAL = frozenset(
    {
        "bloom",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "opt",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
SEQ2SEQ = frozenset({"bart", "encoder-decoder", "t5"})
HALVES = frozenset({"bert", "gpt2", "roberta"})  # of an encoder-decoder
MASKED = frozenset({"bert", "roberta"})
ONE_PROMPT_AT_A_TIME = frozenset(
    {"bloom"}
)  # its padded rows turn NaN, which reaches real rows as 0 * NaN

Model = Any  # transformers is untyped here
Config = Any


@dataclass(frozen=True)
class Call:
    """One forward pass: new tokens of each row, where they stand and what they may look at."""

    tokens_NQ: Tensor
    mask_NW: Tensor
    positions_NQ: Tensor
    cache: Cache
    states_NSH: Tensor | None = None
    source_mask_NS: Tensor | None = None
    num_logits: int = 1  # of the last tokens of each row
    starts_N: Tensor | None = (
        None  # the first column that each row may look at, where it may look at all from there on
    )


@dataclass(frozen=True)
class Context:
    """How many tokens fit: of a causal model prompt and answer share `tokens`; an encoder has a limit of its own."""

    tokens: int
    source_tokens: int | None = None

    def room_for(self, num_prompt: int) -> int:
        """Tokens an answer to such a prompt may have; none or fewer if the prompt is too long."""
        if self.source_tokens is None:
            return self.tokens - num_prompt
        return self.tokens if num_prompt <= self.source_tokens else 0


@dataclass(frozen=True)
class Family:
    """How to call one model; context sizes are None where positions have no end."""

    # logits of the last token [N, V], or of the last K if the call asks for several [N, K, V]
    forward: Callable[[Model, Call], Tensor]
    context_tokens: int | None
    reads_column_order: bool = (
        False  # whether it sees distances between columns instead of positions
    )
    can_pad_prompts: bool = True  # whether prompts of different lengths may share a prefill
    has_encoder: bool = False
    source_tokens: int | None = None
    start_token: int = 0  # what a decoder with an encoder begins with
    cache_dtype: torch.dtype | None = None  # of keys and values; None: as they come

    def encode(self, model: Model, tokens_NS: Tensor, mask_NS: Tensor) -> Tensor:
        """The encoder's output [N, S, H], as the decoder reads it."""
        states_NSH: Tensor = model.get_encoder()(input_ids=tokens_NS, attention_mask=mask_NS)[0]
        projection = getattr(model, "enc_to_dec_proj", None)
        return states_NSH if projection is None else projection(states_NSH)

    def context(self, max_tokens: int) -> Context:
        """What fits when neither prompts nor answers may go over max_tokens."""
        tokens = min(max_tokens, self.context_tokens or max_tokens)
        if not self.has_encoder:
            return Context(tokens)
        return Context(tokens, min(max_tokens, self.source_tokens or max_tokens))


def refuse_unlisted(config: Config) -> None:
    """Raises UnsupportedModel for anything the shared-cursor batch is not known to be exact for."""
    kind = config.model_type
    if kind in MASKED:
        raise UnsupportedModel(f"{kind} is an encoder and generates nothing; use it as a teacher")
    if kind not in CAUSAL | SEQ2SEQ:
        raise UnsupportedModel(
            f"model type {kind!r} cannot be served; supported: {', '.join(sorted(CAUSAL | SEQ2SEQ))}"
        )
    if (
        kind == "encoder-decoder"
        and not {config.encoder.model_type, config.decoder.model_type} <= HALVES
    ):
        raise UnsupportedModel(
            f"an encoder-decoder of {config.encoder.model_type!r} and {config.decoder.model_type!r} cannot be "
            f"served; supported halves: {', '.join(sorted(HALVES))}"
        )


def family_of(model: nn.Module) -> Family:
    """How to call this model. Raises UnsupportedModel."""
    config: Config = model.config
    refuse_unlisted(config)
    if config.model_type in CAUSAL:
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        lean = _lean(model)
        return Family(
            forward=lean.call
            if lean
            else _causal
            if takes_positions
            else _causal_without_positions,
            cache_dtype=lean.cache_dtype if lean else None,
            context_tokens=_num_positions(config),
            can_pad_prompts=config.model_type not in ONE_PROMPT_AT_A_TIME,
            reads_column_order=_reads_column_order(config),
        )
    has_halves = config.model_type == "encoder-decoder"
    return Family(
        forward={"t5": _t5, "bart": _bart, "encoder-decoder": _halves}[config.model_type],
        context_tokens=_num_positions(config.decoder if has_halves else config),
        has_encoder=True,
        source_tokens=_num_positions(config.encoder if has_halves else config),
        start_token=_start_token(model),
    )


def _reads_column_order(config: Config) -> bool:
    # alibi counts the mask's columns, and so does a sliding window
    return config.model_type == "bloom" or getattr(config, "sliding_window", None) is not None


def _num_positions(config: Config) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    # RoBERTa counts from behind the padding's position
    return int(positions) - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)


def _start_token(model: Model) -> int:
    for source in (getattr(model, "generation_config", None), model.config):
        token = getattr(source, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    raise UnsupportedModel(
        "the model's config names no decoder_start_token_id; add it to config.json"
    )


def _lean(model: Model) -> LlamaDecoder | None:
    # elsewhere than on a CPU a step is not held up by Python in this way, or not measured
    if not is_lean(model) or next(model.parameters()).device.type != "cpu":
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
    # positions are relative: the bias depends on the distance between columns only
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
        return nn.functional.embedding(call.positions_NQ + table.offset, table.weight)

    # BART takes every row's position to be the cache's length
    hook = model.get_decoder().embed_positions.register_forward_hook(embed)
    try:
        return _t5(model, call)
    finally:
        hook.remove()


def _halves(model: Model, call: Call) -> Tensor:
    # the decoder directly: the whole model would project the encoder's output again
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
