"""Trainers of tiny pairs on a pretended GPU."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from app.contracts.distillation import Hyperparameters, Objective, Student
from tests.worker.memory_sink import MemorySink
from worker.distill.data.rows import Example
from worker.distill.losses.lm_head import Head, head_of
from worker.distill.students.recipe import load_model, plan_student
from worker.distill.teachers.cached_teacher import CachedTeacher, LiveTeacher
from worker.distill.teachers.row_format import RowFormat
from worker.distill.teachers.signals import Signal
from worker.distill.training.checkpoint import TrainState
from worker.distill.training.devices import Placement, find_device
from worker.distill.training.inputs import TrainingInputs
from worker.distill.training.trainer import Trainer

NUM_TOKENS = 128  # fewer than any tokenizer has


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
    """Returns a trainer whose teacher and student are models of this folder, both on the GPU.

    Options beside the fields: `source_tokens` for the encoder, the `student` of the job, and the
    function `taught_by` that returns another teacher than `teacher_of`.
    """
    device = find_device()
    examples = rows(12, source_tokens=changes.pop("source_tokens", 0))
    student = changes.pop("student", Student(num_layers=2, fit_rows=0, freeze_head=False))
    taught_by = changes.pop("taught_by", teacher_of)
    setup = TrainingInputs(
        out=Path(tempfile.mkdtemp()),
        objective=Objective(),
        hyperparameters=Hyperparameters(batch_tokens=128, n_epochs=2),
        seed=0,
        keep_checkpoints=1,
        recipe=plan_student(folder, folder, student),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        num_tokens=NUM_TOKENS,
        train=examples[:8],
        valid=examples[8:],
        teacher=taught_by(folder, examples, device.autocast or torch.float32),
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
    """Returns a teacher that runs at every step."""
    model = load_model(folder, dtype).to("cuda").requires_grad_(False)
    head = float32_head(model)
    return CachedTeacher(lambda: LiveTeacher(model), head, examples, None, None)


def cached_teacher_of(folder: Path, examples: list[Example], dtype: torch.dtype) -> CachedTeacher:
    """Returns a teacher whose rows are all in the row cache."""
    head = float32_head(load_model(folder, dtype).to("cuda").requires_grad_(False))
    row_format = RowFormat("hidden", head.weight_VH.shape[1], dtype)
    cache: Any = FullCache([row_format.blob_bytes(example.num_targets) for example in examples])

    def load() -> NoReturn:
        raise AssertionError("all rows are cached")

    return CachedTeacher(load, head, examples, cache, row_format)


def storing_teacher_of(folder: Path, examples: list[Example], dtype: torch.dtype) -> CachedTeacher:
    """Returns a teacher that computes rows in the format of the row cache."""
    model = load_model(folder, dtype).to("cuda").requires_grad_(False)
    head = float32_head(model)
    row_format = RowFormat("hidden", head.weight_VH.shape[1], dtype)
    return CachedTeacher(lambda: LiveTeacher(model), head, examples, None, row_format)


@dataclass(frozen=True)
class FullCache:
    """Stands for the files of a row cache, which fake tensors cannot be read from."""

    sizes: list[int]
    num_missing = 0

    def get(self, number: int) -> Tensor:
        return torch.zeros(self.sizes[number], dtype=torch.uint8)


def float32_head(model: PreTrainedModel) -> Head:
    """Returns the LM head in float32, as the loss needs it."""
    head = head_of(model, NUM_TOKENS)
    return replace(head, weight_VH=head.weight_VH.float())
