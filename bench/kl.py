"""KL divergence of the rounded models that we serve from the float32 one, per token.

    .venv/bin/python -m bench.kl MODEL_DIR [--weights bfloat16 int8] [--prompts 16] [--tokens 48]

The float32 model answers prompts greedily. Every model then reads the prompts and answers through the serving engine's decode
steps, and its logits are compared at each position.
"""

# N rows, T positions, V vocabulary
import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import Entry
from bench.serve import PROMPTS
from worker.serve.batch_generate import generate_all
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.loading import LoadedModel, load_model


def texts_of(loaded: LoadedModel, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Chat prompts with the model's greedy answers, cut to one length."""
    prompts = [
        loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in PROMPTS[:num_prompts]
    ]
    answers = generate_all(loaded.model, prompts, max_new_tokens=num_tokens)
    texts = [[*prompt, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=True)]
    return [text[: min(map(len, texts))] for text in texts]


def logprobs(loaded: LoadedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of the next token after each position [T, N, V]."""
    batch = CursorBatch(loaded.model, max_rows=len(texts), max_width=len(texts[0]))
    steps = [batch.join([text[:1] for text in texts])]
    steps += [batch.advance(tokens) for tokens in zip(*(text[1:] for text in texts), strict=True)]
    return torch.stack(steps).log_softmax(dim=-1)


def compare(exact_TNV: Tensor, found_TNV: Tensor) -> Entry:
    kl_TN = (exact_TNV.exp() * (exact_TNV - found_TNV)).sum(dim=-1)
    is_same_TN = exact_TNV.argmax(dim=-1) == found_TNV.argmax(dim=-1)
    return {
        "num_tokens": kl_TN.numel(),
        "kl_nats_per_token": kl_TN.mean().item(),
        "kl_p99": kl_TN.flatten().quantile(0.99).item(),
        "kl_max": kl_TN.max().item(),
        "agreement": is_same_TN.float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.kl", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument(
        "--weights", nargs="+", choices=("bfloat16", "int8"), default=("bfloat16", "int8")
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    plain = load_model(arguments.model_dir)
    texts = texts_of(plain, arguments.prompts, arguments.tokens)
    exact_TNV = logprobs(plain, texts)
    del plain
    for weights in arguments.weights:
        loaded = load_model(arguments.model_dir, weights=weights, keeps_plain=False)
        print(weights, json.dumps(compare(exact_TNV, logprobs(loaded, texts))), flush=True)


if __name__ == "__main__":
    main()
