"""A quantised teacher and the full one on a CPU: KL divergence, agreement, memory and speed.

    .venv/bin/python -m bench.teacher_precision MODEL_DIR [--precisions int8 int4] [--prompts 64] [--tokens 64]

The full teacher answers prompts greedily. Each teacher then computes the rows of these texts as in a job, and answers
eight prompts. The full teacher is prepared as in a job. The figures are relative to it.
"""

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoTokenizer, PreTrainedModel

from app.contracts.distillation import TeacherPrecision
from bench.cases import Entry
from bench.serve import PROMPTS
from worker.cpu import TRAINS_IN_BFLOAT16, prepare_for_inference
from worker.distill.data.rows import Example
from worker.distill.losses.lm_head import load_head
from worker.distill.students.recipe import load_model
from worker.distill.teacher_quality import compare
from worker.distill.teachers.cached_teacher import LiveTeacher
from worker.distill.teachers.quantized import load_quantized, stored_bytes
from worker.distill.training.devices import Placement, on_cpu
from worker.serve.batch_generate import generate_all

NUM_ANSWERED, NUM_NEW = 8, 32  # prompts and tokens of the timed answers


def prompts_of(folder: Path, number: int) -> list[list[int]]:
    """Chat prompts. Later rounds over the list add a word, so that no prompt occurs twice."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [
        f"{PROMPTS[i % len(PROMPTS)]}{' Be brief.' * (i // len(PROMPTS))}" for i in range(number)
    ]
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
        for text in texts
    ]


def timed_rows(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[torch.Tensor, float]:
    """The inputs of the LM head at all targets, and the seconds that they took."""
    teacher = LiveTeacher(model)
    teacher.hidden(examples[:2])  # warm-up
    begun = time.perf_counter()
    hidden = teacher.hidden(examples)
    return torch.cat(hidden), time.perf_counter() - begun


def answer_seconds(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> float:
    begun = time.perf_counter()
    generate_all(model, prompts[:NUM_ANSWERED], max_new_tokens=NUM_NEW, end_ids=frozenset())
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.teacher_precision")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--precisions", nargs="+", default=["int8", "int4"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    task = parser.parse_args()
    prompts = prompts_of(task.model_dir, task.prompts)
    model = load_model(task.model_dir)
    answers = generate_all(model, prompts, max_new_tokens=task.tokens)
    examples = [
        Example((*prompt, *answer.tokens), ((len(prompt), len(prompt) + len(answer.tokens)),))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    exact_NH, _ = timed_rows(model, examples)
    full_bytes = sum(stored_bytes(weight) for weight in model.parameters())
    dtype = torch.bfloat16 if TRAINS_IN_BFLOAT16 else torch.float32
    prepare_for_inference(model, dtype=dtype, exact=model.get_output_embeddings())
    head = load_head(task.model_dir)
    full: Entry = {}
    for name in ("full", *task.precisions):
        begun = time.perf_counter()
        if name != "full":
            assert name in get_args(TeacherPrecision)
            model = load_quantized(
                task.model_dir,
                name,
                device="cpu",
                dtype=on_cpu(Placement(), name).teacher_dtype,
            )
            prepare_for_inference(model, dtype=dtype, exact=model.get_output_embeddings())
        load_seconds = time.perf_counter() - begun
        hidden_NH, row_seconds = timed_rows(model, examples)
        kl, agreement = compare(exact_NH, hidden_NH.float(), head)
        num_bytes = sum(stored_bytes(weight) for weight in model.parameters())
        entry: Entry = {
            "teacher": name,
            "num_tokens": len(hidden_NH),
            "kl_nats_per_token": kl,
            "agreement": agreement,
            "weight_bytes": num_bytes,
            "weight_bytes_ratio": num_bytes / full_bytes,
            "load_seconds": load_seconds,
            "row_seconds": row_seconds,
            "answer_seconds": answer_seconds(model, prompts),
        }
        full = full or entry
        for figure in ("row_seconds", "answer_seconds"):
            entry[f"{figure}_ratio"] = entry[figure] / full[figure]
        print(json.dumps(entry), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
