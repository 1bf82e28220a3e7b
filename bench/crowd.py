"""What the float of the weights costs in text: `python -m bench.crowd MODEL_DIR [--prompts 96] [--json FILE]`.

Greedy answers of our engine to the serving bench's prompts, for each float: how many differ from those of plain weights, and how
many change when 16 run at once instead of one at a time. Counts only: nothing here is timed.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from app.contracts.generation import LoadedWeights
from bench.cases import Entry
from bench.serve import PROMPTS
from worker.serve.batch_generate import generate_all
from worker.serve.loading import load_model

NUM_TOKENS = 48
CROWD = 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crowd", description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: Entry = {}
    plain: list[list[int]] = []
    for weights in get_args(LoadedWeights):
        alone, crowded = (
            answers(arguments.model_dir, weights, arguments.prompts, n) for n in (1, CROWD)
        )
        plain = plain or alone
        found[weights] = {
            "prompts": len(alone),
            "changed_by_the_crowd": num_different(alone, crowded),
            "unlike_plain": num_different(alone, plain),
            "tokens_until_unlike_plain": sum(map(common, alone, plain)) / len(alone),
        }
        print(weights, found[weights], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def answers(
    folder: Path, weights: LoadedWeights, num_prompts: int, max_running: int
) -> list[list[int]]:
    loaded = load_model(folder, weights=weights, keeps_plain=False)
    prompts = [
        loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in PROMPTS[:num_prompts]
    ]
    done = generate_all(loaded.model, prompts, max_new_tokens=NUM_TOKENS, max_running=max_running)
    return [list(answer.tokens) for answer in done]


def num_different(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> int:
    return sum(mine != other for mine, other in zip(ours, theirs, strict=True))


def common(mine: list[int], other: list[int]) -> int:
    """Tokens before the two part."""
    return next(
        (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b),
        min(len(mine), len(other)),
    )


if __name__ == "__main__":
    main()
