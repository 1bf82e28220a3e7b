"""Every listed family against its own plain forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from worker.serve.batch import CursorBatch
from worker.serve.errors import UnsupportedModel
from worker.serve.families import CAUSAL, family_of

pytestmark = pytest.mark.usefixtures("small_first_buffers")

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {  # Any: settings of config classes
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gemma3_text": LLAMA_LIKE
    | {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": LLAMA_LIKE,
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE | {"sliding_window": 8},
    "opt": LLAMA_LIKE | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 8},
    "smollm3": LLAMA_LIKE | {"no_rope_layers": [1, 1, 1, 0]},
}


def tiny(model_type: str) -> Any:  # Any: transformers is untyped here
    config = AutoConfig.for_model(
        model_type, vocab_size=200, pad_token_id=0, eos_token_id=2, **CONFIGS[model_type]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval().double()  # rounding aside, any difference is a mistake


def test_every_listed_family_is_tried() -> None:
    assert CONFIGS.keys() == CAUSAL


@pytest.mark.parametrize("model_type", sorted(CAUSAL))
def test_logits_equal_a_plain_forward_pass(model_type: str, largest_difference: Callable[..., float]) -> None:
    batch = CursorBatch(tiny(model_type), max_rows=5, max_width=40)
    assert largest_difference(batch, seed=3) < 1e-5


@pytest.mark.parametrize("model_type", ["mamba", "t5", "gptj"])
def test_an_unlisted_family_is_refused_by_name(model_type: str) -> None:
    model = torch.nn.Linear(1, 1)
    model.config = AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedModel, match=model_type):
        family_of(model)
