"""Tokens read ahead and cut back, against a plain forward pass over what was kept."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from worker.serve.decoding.speculative_batch import LookaheadBatch

pytestmark = pytest.mark.usefixtures("small_first_buffers")

NextLogits = Callable[..., Tensor]
CLOSE, FAR = 1e-5, 1e-2  # relative to a row's largest logit
WIDTH, NUM_AHEAD = 40, 4
LLAMA_ARGUMENTS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {  # Any: settings of config classes
    "llama": LLAMA_ARGUMENTS,
    "mistral": LLAMA_ARGUMENTS | {"sliding_window": 8, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": WIDTH},
    "opt": LLAMA_ARGUMENTS
    | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": WIDTH},
    "gpt_neox": LLAMA_ARGUMENTS,
    "starcoder2": LLAMA_ARGUMENTS | {"sliding_window": 8, "num_key_value_heads": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def tiny(family: str) -> Any:  # Any: transformers is untyped here
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family, vocab_size=200, pad_token_id=0, eos_token_id=2, **CONFIGS[family]
        )
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval().double()  # rounding aside, any difference is a mistake


def worst_difference(
    batch: LookaheadBatch, next_logits: NextLogits, *, num_moves: int = 60
) -> float:
    """The largest error of a kept token's logits, relative to the largest logit."""
    rng = random.Random(4)
    rows: list[list[int]] = []
    worst = 0.0

    def check(logits_V: Tensor, tokens: list[int]) -> None:
        nonlocal worst
        expected_V = next_logits(batch.model, tokens)
        worst = max(worst, float((logits_V - expected_V).abs().max() / expected_V.abs().max()))

    def words(count: int) -> list[int]:
        return [rng.randrange(3, 200) for _ in range(count)]

    for _ in range(num_moves):
        move = rng.choice(["join", "leave", *["look"] * 6])
        if move == "join" and len(rows) < batch.max_rows:
            rows.append(words(rng.choice([1, 2, 9])))
            batch.join([rows[-1]])
        elif move == "leave" and rows:
            row = rng.randrange(len(rows))
            batch.leave(row)
            last = rows.pop()
            if row < len(rows):
                rows[row] = last
        elif move == "look" and rows and max(map(len, rows)) <= WIDTH - NUM_AHEAD:
            batch.make_room_for(NUM_AHEAD)
            ahead = [words(NUM_AHEAD) for _ in rows]
            logits_NQV = batch.forward(ahead, offset=0, num_logits=NUM_AHEAD)
            kept = [rng.randint(1, NUM_AHEAD) for _ in rows]
            for row, (tokens, num) in enumerate(zip(ahead, kept, strict=True)):
                for position in range(num):
                    rows[row].append(tokens[position])
                    check(logits_NQV[row, position], rows[row])
            batch.keep(kept)
            # what is kept ends at the cursor in every row
            last_again = [[tokens[-1], 7] for tokens in rows]
            batch.make_room_for(1)
            for logits_V, tokens in zip(batch.forward(last_again, offset=-1), rows, strict=True):
                check(logits_V, [*tokens, 7])
    return worst


@pytest.mark.parametrize("family", CONFIGS)
def test_kept_tokens_have_the_logits_of_a_plain_forward_pass(
    family: str, next_logits: NextLogits
) -> None:
    batch = LookaheadBatch(tiny(family), max_rows=4, max_width=WIDTH + NUM_AHEAD)
    assert worst_difference(batch, next_logits) < CLOSE


class GapsLeftOpen(LookaheadBatch):
    def _close(self, gaps: Any, column: int) -> None:
        pass


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_gap_left_open_would_be_seen(family: str, next_logits: NextLogits) -> None:
    batch = GapsLeftOpen(tiny(family), max_rows=4, max_width=WIDTH + NUM_AHEAD)
    assert worst_difference(batch, next_logits) > FAR


@pytest.mark.parametrize("family", ["mistral", "bloom"])
def test_columns_out_of_order_would_be_seen_where_distances_are_read(
    family: str, next_logits: NextLogits
) -> None:
    batch = LookaheadBatch(tiny(family), max_rows=4, max_width=WIDTH + NUM_AHEAD)
    object.__setattr__(batch.family, "reads_column_order", False)
    assert worst_difference(batch, next_logits) > FAR
