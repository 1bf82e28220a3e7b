"""What differs between model families; the only file that knows model types.

A family is listed once its tiny model gives the logits of a plain forward pass under random joins and
leaves (tests/worker/serve/test_families.py). Unlisted ones are refused: they fail silently, not loudly.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from worker.serve.errors import UnsupportedModel

CAUSAL = frozenset(
    {"bloom", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3", "smollm3"}
)
ONE_PROMPT_AT_A_TIME = frozenset({"bloom"})  # its padded rows turn NaN, which reaches real rows as 0 * NaN


@dataclass(frozen=True)
class Family:
    """How to call one model: whether it takes positions, whether padded prompts may share a prefill."""

    takes_positions: bool
    can_pad_prompts: bool
    context_tokens: int | None


def family_of(model: nn.Module) -> Family:
    """Raises UnsupportedModel for anything the shared-cursor batch is not known to be exact for."""
    config: Any = model.config  # transformers is untyped here
    if config.model_type not in CAUSAL:
        raise UnsupportedModel(
            f"model type {config.model_type!r} cannot be served; supported: {', '.join(sorted(CAUSAL))}"
        )
    context = getattr(config, "max_position_embeddings", None)
    return Family(
        takes_positions="position_ids" in inspect.signature(model.forward).parameters,
        can_pad_prompts=config.model_type not in ONE_PROMPT_AT_A_TIME,
        context_tokens=int(context) if context else None,
    )
