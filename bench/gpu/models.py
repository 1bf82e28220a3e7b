"""Models with random weights, their tokenizer, rows of a given length, and specs of runs."""

import json
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bench.gpu.sizes import Shape, Sizes
from tests.tiny import SENTENCES, tiny_tokenizer
from worker.models.architectures import bare_model
from worker.protocol.run_spec import RunSpec

CONTEXT_TOKENS = 4096
SPARE_TOKENS = 20  # of a row, for the chat template
SHARD_SIZE = "4GB"
NUM_HELD_OUT = 4
Json = dict[str, Any]  # Any: open-ended JSON


def save_models(work: Path, sizes: Sizes, device: str) -> tuple[Path, Path]:
    """Writes teacher and student with random bfloat16 weights, and returns their folders."""
    tokenizer = wide_tokenizer(sizes.vocab_size)
    folders = []
    for seed, (name, shape) in enumerate((("teacher", sizes.teacher), ("student", sizes.student))):
        folder = work / name
        torch.manual_seed(seed)
        random_model(shape, tokenizer, device).save_pretrained(folder, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


def wide_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with `vocab_size` tokens, most of which no text contains."""
    tokenizer = tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    for number in range(len(vocabulary), vocab_size):
        vocabulary[f"filler {number}"] = number  # a space never occurs in a byte-level token
    wide: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        model_max_length=CONTEXT_TOKENS,
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
    )
    wide.chat_template = tokenizer.chat_template
    return wide


@torch.no_grad()
def random_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, device: str) -> Any:
    """Returns a Llama model in bfloat16. Its weights never exist in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="bfloat16",
    )
    model = bare_model(config).to(torch.bfloat16).to_empty(device=device)
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02)
    return model


def write_rows(path: Path, tokenizer: Any, num_rows: int, row_tokens: int, seed: int) -> Path:
    """Writes rows of slightly fewer than `row_tokens` tokens. One half of a row is completion."""
    random = Random(seed)
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    num_tokens = (row_tokens - SPARE_TOKENS) // 2

    def text() -> str:
        """Returns random words with at most `num_tokens` tokens."""
        chosen = random.choices(words, k=num_tokens)
        lengths = [len(ids) for ids in tokenizer([f" {word}" for word in chosen])["input_ids"]]
        num_words = sum(total <= num_tokens for total in accumulate(lengths))
        return " ".join(chosen[:num_words])

    rows = [{"prompt": text(), "completion": text()} for _ in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec_of(
    work: Path,
    folders: tuple[Path, Path],
    *,
    num_rows: int,
    row_tokens: int,
    block: Json,
    **more: Any,
) -> RunSpec:  # Any: fields of RunSpec
    """Returns the spec of a run with a teacher and a start model, and writes its rows."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders[0])
    work.mkdir(parents=True, exist_ok=True)
    train = write_rows(work / "train.jsonl", tokenizer, num_rows, row_tokens, seed=1)
    valid = write_rows(work / "valid.jsonl", tokenizer, NUM_HELD_OUT, row_tokens, seed=2)
    evaluation = {"metrics": ["perplexity", "agreement"], "num_samples": 0}
    return RunSpec.model_validate(
        {
            "distillation": {"teacher": "random", "evaluation": evaluation, **block},
            "teacher_dir": folders[0],
            "start_dir": folders[1],
            "training_path": train,
            "validation_path": valid,
            "cache_dir": work / "cache",
            "num_processes": 1,
            "keep_checkpoints": 1,
            **more,
        }
    )
