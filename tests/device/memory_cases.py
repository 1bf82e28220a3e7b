"""Memory of training steps of real sizes: `python -m tests.device.memory_cases SHIM FOLDERS OUTPUT`.

For each pair, the estimate stands beside the peak of a traced step.
"""

import sys
from pathlib import Path

from tests.device.shim import load_shim

if __name__ == "__main__":  # before the first import of torch
    load_shim(Path(sys.argv[1]))

import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from app.contracts.distillation import (
    AttentionTerm,
    Data,
    HiddenTerm,
    Hyperparameters,
    Objective,
    Student,
)
from app.contracts.memory.step_parts import RolloutSizes, StepParts, rollout_bytes
from tests.device.fake_cuda import fake_cuda
from tests.device.memory_log import MemoryLog, fused_attention
from tests.tiny import tiny_tokenizer
from tests.worker.memory_sink import MemorySink
from worker.distill.data.rows import Example
from worker.distill.losses.lm_head import Head, head_of
from worker.distill.students.recipe import load_model, plan_student
from worker.distill.teachers.cached_teacher import CachedTeacher, LiveTeacher
from worker.distill.teachers.signals import Signal
from worker.distill.training.checkpoint import MOMENTS, TrainState
from worker.distill.training.devices import (
    Placement,
    find_device,
    needs_by_tokens,
    planned_config,
    sizes_of_config,
)
from worker.distill.training.feature_losses import FeaturePlan
from worker.distill.training.inputs import TrainingInputs
from worker.distill.training.rollouts import RolloutPlan
from worker.distill.training.trainer import Trainer
from worker.train import EngineSampler

Json = dict[str, Any]  # Any: open-ended JSON

LLAMA: Json = {"model_type": "llama", "max_position_embeddings": 8192}
QWEN: Json = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
# published sizes
MODELS: dict[str, Json] = {
    "7B": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "1B": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "1.5B": {
        **QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "0.5B": {
        **QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "SmolLM2": {
        **LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "GPT-2": {"model_type": "gpt2"},
    "T5": {
        "model_type": "t5",
        "d_model": 768,
        "d_ff": 3072,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "d_kv": 64,
        "vocab_size": 32128,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Pair:
    """A teacher, a start model and the options of a job."""

    teacher: str
    start: str
    student: Student
    batch_tokens: int = 4096
    row_tokens: int = 512
    micro_tokens: int | None = None
    has_checkpointing: bool = False
    has_bfloat16: bool = True
    hidden: HiddenTerm | None = None
    attention: AttentionTerm | None = None
    new_tokens: int | None = None  # of rollouts; only their generation is traced


HALF = Student(num_layers=15, fit_rows=0)
PAIRS: dict[str, Pair] = {
    "7B -> 1B": Pair("7B", "1B", Student(init="checkpoint", freeze_head=False)),
    "1.5B -> 0.5B": Pair("1.5B", "0.5B", Student(init="checkpoint", freeze_head=False)),
    "SmolLM2, 30 -> 15 layers": Pair("SmolLM2", "SmolLM2", HALF),
    # rows of this length fill the chunks of logits, so that the loss takes the most memory
    "GPT-2, 12 -> 6 layers": Pair(
        "GPT-2", "GPT-2", Student(num_layers=6, fit_rows=0, freeze_head=False), row_tokens=446
    ),
    "T5, 12 -> 6 layers": Pair(
        "T5",
        "T5",
        Student(num_decoder_layers=6, fit_rows=0, freeze_head=False, freeze_encoder=False),
        row_tokens=512,
    ),
    "1.5B -> 0.5B, activation checkpointing": Pair(
        "1.5B", "0.5B", Student(init="checkpoint", freeze_head=False), 8192, has_checkpointing=True
    ),
    "SmolLM2, accumulated": Pair("SmolLM2", "SmolLM2", HALF, 8192, micro_tokens=4096),
    "SmolLM2, LoRA": Pair("SmolLM2", "SmolLM2", Student(init="lora")),
    "SmolLM2, hidden states": Pair("SmolLM2", "SmolLM2", HALF, hidden=HiddenTerm()),
    "1.5B -> 0.5B, hidden states": Pair(
        "1.5B",
        "0.5B",
        Student(init="checkpoint", freeze_head=False),
        hidden=HiddenTerm(kind="cosine"),
        has_checkpointing=True,
    ),
    "SmolLM2, attention relations": Pair(
        "SmolLM2", "SmolLM2", HALF, attention=AttentionTerm(num_relation_heads=3)
    ),
    "SmolLM2, rollouts": Pair("SmolLM2", "SmolLM2", HALF, 16384, row_tokens=1024, new_tokens=16),
}


def compare(pair: Pair, folders: Path) -> Json:
    """Returns the estimated and the traced bytes of a step."""
    with fake_cuda(has_bfloat16=pair.has_bfloat16), fused_attention():
        device = find_device()
        dtype = device.autocast or torch.float32
        big = load_model(folders / pair.teacher, dtype).to("cuda").requires_grad_(False)
        trainer = trainer_of(pair, folders, big)
        create_moments(trainer.optimizer)
        log = MemoryLog()
        log.watch(tensors_of(trainer, big))
        before = log.live_bytes
        with log:
            pieces = trainer._next_pieces()
            if pair.new_tokens is None:
                trainer._step(pieces)
        teacher, start = (
            AutoConfig.from_pretrained(folders / n) for n in (pair.teacher, pair.start)
        )
        needs_of = needs_by_tokens(
            device,
            trainer.setup.recipe,
            start,
            teacher,
            can_cache=False,
            row_tokens=pair.row_tokens // 2 if "T5" in pair.teacher else pair.row_tokens,
            source_share=0.5,
            parts=StepParts(pair.hidden, pair.attention),
        )
        if pair.new_tokens is not None:
            answers = RolloutSizes(pair.batch_tokens // pair.row_tokens, pair.row_tokens)
            sizes = sizes_of_config(planned_config(trainer.setup.recipe, start))
            return {
                "traced": log.peak_bytes - before,
                "estimated": rollout_bytes(sizes, answers),
                "num_pieces": 1,
            }
        needs = needs_of(pair.micro_tokens or pair.batch_tokens, len(pieces) > 1)
        return {
            "traced": log.peak_bytes,
            "estimated": needs.both_bytes(dtype, has_checkpointing=pair.has_checkpointing),
            "weights_of_teacher": needs.num_teacher_parameters * dtype.itemsize,
            "num_pieces": len(pieces),
        }


def trainer_of(pair: Pair, folders: Path, teacher: PreTrainedModel) -> Trainer:
    """Returns a trainer of a pair whose teacher runs in every step, both models on the GPU."""
    device = find_device()
    teacher_dir, start_dir = folders / pair.teacher, folders / pair.start
    num_tokens = int(teacher.config.vocab_size)
    head = head_of(teacher, num_tokens)
    head = Head(head.weight_VH.float(), scale=head.scale)
    rows = rows_of(pair, has_source="T5" in pair.teacher)
    has_features = pair.hidden is not None or pair.attention is not None
    setup = TrainingInputs(
        out=folders,
        objective=Objective(hidden=pair.hidden, attention=pair.attention),
        hyperparameters=Hyperparameters(batch_tokens=pair.batch_tokens),
        seed=0,
        keep_checkpoints=1,
        recipe=plan_student(teacher_dir, start_dir, pair.student),
        tokenizer=AutoTokenizer.from_pretrained(start_dir),
        num_tokens=num_tokens,
        train=rows,
        valid=rows[:1],
        teacher=CachedTeacher(lambda: LiveTeacher(teacher), head, rows, None, None),
        signal=Signal("logits", ""),
        has_one_tokenizer=True,
        answers_path=None,
        inputs_sha256="",
        device=device.name,
        autocast=device.autocast,
        placement=Placement(
            device,
            "cuda",
            teacher.dtype,
            has_checkpointing=pair.has_checkpointing,
            micro_tokens=pair.micro_tokens,
        ),
        features=FeaturePlan(pair.hidden, pair.attention, lambda: teacher, rows, 0)
        if has_features
        else None,
        rollouts=rollouts_of(pair, rows),
    )
    return Trainer(setup, TrainState(), MemorySink(), lambda: False, lambda share: share)


def rollouts_of(pair: Pair, rows: list[Example]) -> RolloutPlan | None:
    """Returns the plan of a pair whose student answers the prompts of every batch."""
    if pair.new_tokens is None:
        return None
    return RolloutPlan(
        data=Data(completions="student", student_share=1.0, max_new_tokens=pair.new_tokens),
        then=None,
        seed=0,
        train=rows,
        teacher_train=rows,
        max_tokens=pair.row_tokens,
        num_tokens=49152,
        sampler_for=EngineSampler,
    )


def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state that AdamW creates in its first step."""
    for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        moments = {name: torch.zeros_like(parameter.detach()) for name in MOMENTS}
        step = torch.zeros((), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **moments}


def rows_of(pair: Pair, *, has_source: bool) -> list[Example]:
    """Returns rows of equal length for several steps. All tokens are learned from."""
    length = pair.row_tokens
    number = pair.batch_tokens // length * 8
    if pair.new_tokens is not None:
        targets = ((length - pair.new_tokens, length),)
        # no prompt begins like another, so that none is in the prefix cache
        return [Example((5 + i,) * length, targets) for i in range(number)]
    if not has_source:
        return [Example((5,) * length, ((1, length),))] * number
    return [Example((5,) * (length // 2), ((1, length // 2),), 0, (5,) * (length // 2))] * number


def tensors_of(trainer: Trainer, teacher: PreTrainedModel) -> Iterator[Tensor]:
    """Yields all tensors that are alive between steps: of both models and of the optimizer."""
    models = (trainer.model, teacher)
    yield from chain.from_iterable((*m.parameters(), *m.buffers()) for m in models)
    assert trainer.setup.teacher is not None
    yield trainer.setup.teacher.head.weight_VH
    for state in trainer.optimizer.state.values():
        yield from state.values()


def write_models(folders: Path) -> None:
    """Writes folders with a configuration and a tokenizer, without weights."""
    for name, config in MODELS.items():
        tiny_tokenizer("unigram" if name == "T5" else "chat").save_pretrained(folders / name)
        options = {key: value for key, value in config.items() if key != "model_type"}
        AutoConfig.for_model(config["model_type"], **options).save_pretrained(folders / name)


def main() -> None:
    """Writes the observations of all pairs, or the traceback of a pair that failed."""
    folders, output = Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    write_models(folders)
    seen: dict[str, Json] = {}
    for name, pair in PAIRS.items():
        try:
            seen[name] = compare(pair, folders)
        except Exception:  # noqa: BLE001  # the test of this pair reports it
            seen[name] = {"error": traceback.format_exc()}
    output.write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
