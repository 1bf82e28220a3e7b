"""Trainers of tiny pairs on a pretended GPU."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from app.contracts.distillation import Hyperparameters, Objective, Student
from tests.worker.memory_sink import MemorySink
from worker.distill.data.rows import Example
from worker.distill.losses.lm_head import head_of
from worker.distill.students.recipe import load_model, plan_student
from worker.distill.teachers.cached_teacher import CachedTeacher, LiveTeacher
from worker.distill.teachers.signals import Signal
from worker.distill.training.checkpoint import TrainState
from worker.distill.training.devices import Placement, find_device
from worker.distill.training.trainer import Trainer, TrainingInputs


def rows(num_rows: int, *, source_tokens: int = 0) -> list[Example]:
    """Returns rows of different lengths, whose last third is learned from."""
    examples = []
    for number in range(num_rows):
        length = 24 + 3 * (number % 5)
        source = tuple(range(5, 5 + source_tokens))
        examples.append(
            Example(tuple(range(5, 5 + length)), ((2 * length // 3, length),), 0, source)
        )
    return examples


def trainer_of(folder: Path, **changes: Any) -> Trainer:  # Any: fields of TrainingInputs
    """Returns a trainer whose teacher and student are models of this folder, both on the GPU."""
    device = find_device()
    examples = rows(12, source_tokens=changes.pop("source_tokens", 0))
    hyperparameters = Hyperparameters(batch_tokens=128, n_epochs=2)
    setup = TrainingInputs(
        out=Path(tempfile.mkdtemp()),
        objective=Objective(),
        hyperparameters=hyperparameters,
        seed=0,
        keep_checkpoints=1,
        recipe=plan_student(folder, folder, Student(num_layers=2, fit_rows=0, freeze_head=False)),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        num_tokens=384,
        train=examples[:8],
        valid=examples[8:],
        teacher=teacher_of(folder, examples, device.autocast or torch.float32),
        signal=Signal("logits", ""),
        has_one_tokenizer=True,
        answers_path=None,
        inputs_sha256="",
        device=device.name,
        autocast=device.autocast,
        placement=Placement(device, "cuda", device.autocast or torch.float32),
    )
    setup = replace(setup, **changes)
    return Trainer(setup, TrainState(), MemorySink(), lambda: False, lambda share: share)


def teacher_of(folder: Path, examples: list[Example], dtype: torch.dtype) -> CachedTeacher:
    """Returns a teacher that runs at every step, with its LM head in float32."""
    model = load_model(folder, dtype).to("cuda").requires_grad_(False)
    head = head_of(model, 384)
    head = replace(head, weight_VH=head.weight_VH.float())
    return CachedTeacher(lambda: LiveTeacher(model), head, examples, None, None)
