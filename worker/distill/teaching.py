"""The pair of models of a run: how each reads, what of the teacher is used, and the teacher at work."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from worker.distill.checkpoint import file_sha256
from worker.distill.errors import VocabMismatch
from worker.distill.fresh import fresh_config
from worker.distill.heads import Head, load_head
from worker.distill.masked import MaskedTeacher
from worker.distill.preparation import Reader, Rows
from worker.distill.shapes import read_config, shape_of
from worker.distill.signals import Signal, choose_signal
from worker.distill.spec import RunSpec
from worker.distill.students import StudentRecipe, load_model
from worker.distill.teachers import CachedTeacher, LiveTeacher, Teacher, cached_teacher
from worker.gemm import pack_weights


@dataclass(frozen=True)
class Teaching:
    """What is known of teacher and student before anything is computed, and the teacher once it is wanted."""

    spec: RunSpec
    device: str

    @cached_property
    def teacher(self) -> Reader:
        return Reader(read_config(self.spec.teacher_dir), _tokenizer(self.spec.teacher_dir))

    @cached_property
    def student(self) -> Reader:
        fresh = self.spec.distillation.student.config
        if fresh is not None:
            tokenizer = self.teacher.tokenizer
            return Reader(fresh_config(fresh, tokenizer), tokenizer)
        return Reader(read_config(self.spec.start_dir), _tokenizer(self.spec.start_dir))

    @cached_property
    def has_one_tokenizer(self) -> bool:
        """Equal widths are no proof: the vocabularies are compared."""
        return bool(self.teacher.tokenizer.get_vocab() == self.student.tokenizer.get_vocab())

    @cached_property
    def signal(self) -> Signal:
        """Raises UnsupportedModel or TokenizerMismatch for what the pair cannot do."""
        return choose_signal(
            self.spec.distillation.objective.teacher_signal,
            shape_of(self.teacher.config),
            shape_of(self.student.config),
            has_one_tokenizer=self.has_one_tokenizer,
        )

    @cached_property
    def identity(self) -> str:
        """Whose answers and hidden states are on file."""
        return f"{folder_sha256(self.spec.teacher_dir)}:{tokenizer_sha256(self.teacher.tokenizer)}"

    @property
    def answers_path(self) -> Path:
        """Where the teacher's answers are kept for all jobs that ask it."""
        name = hashlib.sha256(self.identity.encode()).hexdigest()[:32]
        return self.spec.cache_dir / "answers" / f"{name}.jsonl"

    def load_teacher(self) -> PreTrainedModel:
        teacher = load_model(self.spec.teacher_dir).to(self.device)
        pack_weights(teacher)
        return teacher.requires_grad_(False)

    def live_teacher(self) -> Teacher:
        model = self.load_teacher()
        if shape_of(model.config) == "masked":
            return MaskedTeacher(model, self.teacher.tokenizer.mask_token_id)
        return LiveTeacher(model)

    def cached_teacher(self, rows: Rows, recipe: StudentRecipe) -> CachedTeacher:
        """The teacher of all students that are made as `recipe` says, whatever their size."""
        head = load_head(self.spec.teacher_dir, len(self.teacher.tokenizer))
        bias_V = None if head.bias_V is None else head.bias_V.to(self.device)
        head = replace(head, weight_VH=head.weight_VH.to(self.device), bias_V=bias_V)
        return cached_teacher(
            self.live_teacher,
            head,
            folder=self.spec.cache_dir / "teacher",
            budget_bytes=self.spec.cache_bytes,
            identity=f"{self.identity}:{self.signal.name}",
            examples=rows.teacher,
            keeps="expected" if self._is_expectation_enough(recipe, head) else "hidden",
        )

    def _is_expectation_enough(self, recipe: StudentRecipe, head: Head) -> bool:
        objective = self.spec.distillation.objective
        if self.signal.name != "logits":
            return False
        is_kl = objective.divergence == "forward_kl" and objective.temperature == 1.0
        is_kl = is_kl and objective.temperature_end in (None, 1.0)
        is_kl = is_kl and (objective.then is None or objective.then.divergence == "forward_kl")
        is_copied = recipe.freeze_head and head.softcap is None
        return is_kl and is_copied and _is_head_of(recipe.start_dir, head)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return loaded


def _is_head_of(folder: Path, head: Head) -> bool:
    try:
        own = load_head(folder, head.num_tokens)
    except VocabMismatch:
        return False
    if own.weight_VH.shape != head.weight_VH.shape or (own.bias_V is None) != (head.bias_V is None):
        return False
    if own.scale != head.scale:
        return False
    is_bias_equal = own.bias_V is None or head.bias_V is None or torch.equal(own.bias_V, head.bias_V)
    return is_bias_equal and torch.equal(own.weight_VH, head.weight_VH.cpu())


def folder_sha256(folder: Path) -> str:
    """Of a model's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
