"""Every listed family against its own plain forward pass."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
)

from worker.cpu.linear_ops import pack_weights
from worker.cpu.llama_decoder import LLAMA_LIKE as HAS_LLAMA_DECODER
from worker.cpu.llama_decoder import fuse_projections, is_llama_like
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.decoding.families import CAUSAL, SEQ2SEQ, family_of
from worker.serve.errors import UnsupportedModel

pytestmark = pytest.mark.usefixtures("small_first_buffers")

LLAMA_ARGUMENTS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VOCABULARY = {"vocab_size": 200, "pad_token_id": 0, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {  # Any: settings of config classes
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gemma3_text": LLAMA_ARGUMENTS
    | {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": LLAMA_ARGUMENTS,
    "granite": LLAMA_ARGUMENTS
    | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 1.5},
    "llama": LLAMA_ARGUMENTS,
    "mistral": LLAMA_ARGUMENTS | {"sliding_window": 8},
    "olmo2": LLAMA_ARGUMENTS,
    "opt": LLAMA_ARGUMENTS | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi3": LLAMA_ARGUMENTS,
    "qwen2": LLAMA_ARGUMENTS,
    "qwen3": LLAMA_ARGUMENTS | {"head_dim": 8},
    "smollm3": LLAMA_ARGUMENTS | {"no_rope_layers": [1, 1, 1, 0]},
    "starcoder2": LLAMA_ARGUMENTS | {"sliding_window": 8},
}


SEQ2SEQ_CONFIGS: dict[str, Callable[[], Any]] = {
    "t5-tied": lambda: t5(feed_forward_proj="relu", tie_word_embeddings=True),
    "t5-gated": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": lambda: AutoConfig.for_model(
        "bart",
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=40,
        decoder_start_token_id=2,
        **VOCABULARY,
    ),
    "bert+bert": lambda: halves("bert", "bert"),
    "roberta+roberta": lambda: halves("roberta", "roberta"),
    "bert+gpt2": lambda: halves("bert", "gpt2"),
    "gpt2+bert": lambda: halves("gpt2", "bert"),
    "bert+wider roberta": lambda: halves("bert", "roberta", hidden_size=48),
}


def t5(**given: Any) -> Any:
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
    }
    # few buckets and a short reach, so that distances fall into all of them
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    return AutoConfig.for_model(
        "t5", decoder_start_token_id=0, **sizes, **buckets, **VOCABULARY, **given
    )


def halves(encoder: str, decoder: str, hidden_size: int = 32) -> Any:
    """Two configs of one width unless told otherwise: then the encoder's output is projected."""
    num_positions = {"bert": 40, "gpt2": 40, "roberta": 42}

    def half(model_type: str, hidden_size: int, num_layers: int, **given: Any) -> Any:
        return AutoConfig.for_model(
            model_type,
            hidden_size=hidden_size,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            max_position_embeddings=num_positions[model_type],
            **{
                **VOCABULARY,
                "pad_token_id": 1 if model_type == "roberta" else 0,
                "bos_token_id": 0,
            },
            **given,
        )

    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        half(encoder, 32, 2), half(decoder, hidden_size, 3)
    )
    config.decoder_start_token_id = 5
    return config


def tiny(model_type: str, **given: Any) -> Any:  # Any: transformers is untyped here
    if model_type in CONFIGS:
        config = AutoConfig.for_model(model_type, **VOCABULARY, **{**CONFIGS[model_type], **given})
    else:
        config = SEQ2SEQ_CONFIGS[model_type]()
    auto = AutoModelForSeq2SeqLM if model_type in SEQ2SEQ_CONFIGS else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, 0.0, 0.3)
            else:  # biases begin as zeros and norms as ones, which hides who left them out
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval().double()  # rounding aside, any difference is a mistake


def test_every_listed_family_is_tried() -> None:
    assert CONFIGS.keys() == CAUSAL
    assert {config().model_type for config in SEQ2SEQ_CONFIGS.values()} == SEQ2SEQ


@pytest.mark.parametrize("model_type", sorted(CAUSAL))
def test_logits_equal_a_plain_forward_pass(
    model_type: str, largest_difference: Callable[..., float]
) -> None:
    batch = CursorBatch(tiny(model_type), max_rows=5, max_width=40)
    assert largest_difference(batch, seed=3) < 1e-5


@pytest.mark.parametrize("model_type", sorted(HAS_LLAMA_DECODER))
def test_a_model_as_a_worker_keeps_it_gives_its_own_logits(model_type: str) -> None:
    model = tiny(
        model_type, **({"sliding_window": None} if model_type == "mistral" else {})
    ).float()
    kept = copy.deepcopy(model)
    assert is_llama_like(kept)
    fuse_projections(kept)
    pack_weights(kept, keeps_plain=False)
    prompts = [[5, 6, 7, 8, 9], [20, 21, 22], [5, 6, 7, 30]]
    batch = CursorBatch(kept, max_rows=3, max_width=40)
    found = [batch.join(prompts), batch.advance([40, 41, 42])]
    for row, (prompt, token) in enumerate(zip(prompts, (40, 41, 42), strict=True)):
        with torch.no_grad():
            expected = model(torch.tensor([[*prompt, token]])).logits[0, -2:]
        # float32 sums in another order
        torch.testing.assert_close(
            torch.stack([f[row] for f in found]), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", SEQ2SEQ_CONFIGS)
def test_an_encoder_decoders_logits_equal_a_plain_forward_pass(
    name: str, largest_difference: Callable[..., float]
) -> None:
    batch = CursorBatch(tiny(name), max_rows=5, max_width=40, max_source_width=40)
    assert largest_difference(batch, seed=3, longest=40) < 1e-5


def test_a_padding_token_in_the_answer_has_the_place_that_roberta_gives_it() -> None:
    model, pad, source = tiny("roberta+roberta"), 1, [9, 8, 7]
    batch = CursorBatch(model, max_rows=2, max_width=40, max_source_width=40)
    batch.join([source])
    cache = None
    for token in (batch.family.start_token, 30, pad, 31):
        if cache is not None:
            [found_V] = batch.advance([token])
        with torch.no_grad():  # the model's own cached step, which finds the positions itself
            output = model(
                input_ids=torch.tensor([source]),
                decoder_input_ids=torch.tensor([[token]]),
                cache=cache,
                use_cache=True,
            )
        cache = output.cache
    torch.testing.assert_close(found_V.double(), output.logits[0, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mamba", "gptj"])
def test_an_unlisted_family_is_refused_by_name(model_type: str) -> None:
    model = torch.nn.Linear(1, 1)
    model.config = AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedModel, match=model_type):
        family_of(model)
