"""Builds the evaluators of a run, which measure its models on held-out or test rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from worker.distill.data.dataset import Rows
from worker.distill.data.rows import Example
from worker.distill.data.sampler import Sampler
from worker.distill.evaluation.held_out import HeldOut, HeldOutRows
from worker.distill.evaluation.report import Evaluator, JudgedTeacher, Tell, View
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.lm_head import head_of
from worker.distill.model_pair import ModelPair
from worker.distill.teachers.cached_teacher import CachedTeacher
from worker.models.architectures import kind_of
from worker.protocol.run_spec import RunSpec

SamplerFor = Callable[[PreTrainedModel], Sampler]


@dataclass(frozen=True)
class Evaluators:
    """Builds evaluators for the models of a pair. `warn` writes an event."""

    spec: RunSpec
    pair: ModelPair
    device: str
    sampler_for: SamplerFor
    warn: Callable[[str], None]

    def of(self, rows: Rows, teacher: CachedTeacher | None, tell: Tell) -> Evaluator:
        """Returns the evaluator of the rows in `rows.valid`. Without a teacher, it has none."""
        objective = TokenObjective.from_objective(self.spec.distillation.objective)
        valid = self._held_out(rows, rows.valid, self.device, self.pair.card.autocast)

        def measure(model: PreTrainedModel) -> HeldOut:
            """Measures a student."""
            head = head_of(model, len(self.pair.student.tokenizer)).exact
            return valid.measure(
                model, head, teacher if self.pair.has_one_tokenizer else None, objective
            )

        return Evaluator(
            spec=self.spec,
            student_view=View(rows.valid, self.pair.student.tokenizer, measure),
            teacher=None if teacher is None else self._judged_teacher(rows, teacher, objective),
            valid_rows=rows.valid_rows,
            device=self.device,
            sampler_for=self.sampler_for,
            on_progress=tell,
            warn=self.warn,
            matmul_dtype=self.pair.card.matmul_dtype,
            decoding_dtype=self.pair.card.decoding_dtype,
            student_dtype=self.pair.card.autocast or torch.float32,
        )

    def _judged_teacher(
        self, rows: Rows, teacher: CachedTeacher, objective: TokenObjective
    ) -> JudgedTeacher:
        """Returns the teacher's view of the rows, and how to load the teacher."""
        examples = rows.teacher[len(rows.train) :]
        # the teacher runs in the dtype of its weights
        valid = self._held_out(rows, examples, self.pair.placement.teacher_device, None)

        def measure(model: PreTrainedModel) -> HeldOut:
            """Measures the teacher."""
            if kind_of(model.config) == "masked":
                return valid.measure_teacher(teacher, objective)
            head = head_of(model, len(self.pair.teacher.tokenizer))
            if (head.weight_VH.device, head.weight_VH.dtype) != (
                teacher.head.weight_VH.device,
                torch.float32,
            ):
                head = teacher.head
            # with uld the teacher has rows for the aligned targets only
            row_teacher = None if self.pair.signal.has_ranks else teacher
            return valid.measure(model, head, row_teacher, objective)

        view = View(valid.examples, self.pair.teacher.tokenizer, measure)
        return JudgedTeacher(view, self.pair.load_evaluated_teacher)

    def _held_out(
        self, rows: Rows, examples: list[Example], device: str, autocast: torch.dtype | None
    ) -> HeldOutRows:
        """Returns the batches of the examples, which follow the training rows in the cache."""
        return HeldOutRows(
            examples,
            first_index=len(rows.train),
            batch_tokens=self.pair.micro_tokens,
            device=device,
            autocast=autocast,
        )
