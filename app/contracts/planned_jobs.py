"""Description of a training job by numbers: what estimates of memory, disk and time depend on.

The API plans a job from the request, and a run from its inputs. Both use the same formulas
(app.contracts.job_memory, app.contracts.job_seconds), so a run can report how good they were.
"""

from dataclasses import dataclass

from app.contracts.batch_plan import batch_tokens_of
from app.contracts.distillation import Distillation
from app.contracts.model_sizes import ModelSizes, num_trained, student_sizes
from app.contracts.run_limits import (
    NUM_ANSWERED,
    NUM_CLASSIFIED,
    NUM_TIMED,
    TOKENS_BEYOND_A_LABEL,
)


@dataclass(frozen=True)
class RowCounts:
    """Counts of rows and tokens of a job.

    train_tokens, valid_tokens: Tokens that the student reads in one pass over the rows.
    train_targets, valid_targets: Tokens that the student learns or is evaluated on.
    teacher_tokens: Tokens that the teacher reads in one pass over training and held-out rows.
    num_unanswered: Rows that the teacher answers.
    prompt_tokens: Mean length of a prompt.
    answer_tokens: Mean length of an answer.
    longest_tokens: Length of the longest row.
    num_test, test_tokens: Test rows and their tokens.
    label_tokens: Length of the longest answer if the answers are class labels, else None.
    num_steps, num_epochs: Steps and epochs of one student.
    num_evals: Evaluations during the training of one student, without the first.
    """

    num_train: int
    num_valid: int
    train_tokens: int
    train_targets: int
    valid_tokens: int
    valid_targets: int
    teacher_tokens: int
    num_unanswered: int
    prompt_tokens: float
    answer_tokens: float
    longest_tokens: int
    num_steps: int
    num_epochs: float
    num_evals: int
    num_test: int = 0
    test_tokens: int = 0
    label_tokens: int | None = None


@dataclass(frozen=True)
class PlannedJob:
    """A job in numbers. `has_teacher` is false for supervised jobs.

    has_expected_rows: The loss needs only the expectation of the teacher's logits, because the
        student has the teacher's frozen LM head (worker.distill.losses.lm_head.ExpectedRows).
    """

    block: Distillation
    has_teacher: bool
    teacher: ModelSizes
    start: ModelSizes
    has_expected_rows: bool

    @property
    def students(self) -> tuple[ModelSizes, ...]:
        """Sizes of the students: one for each size of a ladder, the smallest first."""
        student = self.block.student
        return tuple(student_sizes(student, self.start, size) for size in student.ladder or (None,))

    @property
    def trained(self) -> tuple[int, ...]:
        """Number of trained parameters of each student."""
        return tuple(num_trained(self.block.student, sizes) for sizes in self.students)

    @property
    def num_runs(self) -> int:
        """Number of trainings: one for each student, and one more for a baseline."""
        return len(self.students) + self.block.evaluation.ce_baseline

    @property
    def uses_rows_of_teacher(self) -> bool:
        """True if the teacher's outputs are computed for the rows."""
        return self.has_teacher and self.block.objective.teacher_signal != "text"

    @property
    def keeps_teacher(self) -> bool:
        """True if the teacher runs at every step."""
        objective = self.block.objective
        then = objective.then.completions if objective.then else None
        sources = {self.block.data.completions, then}
        needs_features = objective.hidden is not None or objective.attention is not None
        return self.has_teacher and (needs_features or bool(sources & {"student", "replay"}))

    @property
    def fits_layers(self) -> bool:
        """True if layers are fitted in closed form before the training."""
        student = self.block.student
        cut = any(sizes.num_layers < self.start.num_layers for sizes in self.students)
        return student.init == "layers" and student.fit_rows != 0 and cut

    @property
    def trains_head(self) -> bool:
        """True if the LM head is trained."""
        return not (self.block.student.freeze_head or self.block.student.init == "lora")

    def evaluated_answers(self, rows: RowCounts) -> tuple[int, float]:
        """Returns how many held-out prompts a model answers, and the most tokens of an answer."""
        evaluation = self.block.evaluation
        metrics = {*evaluation.metrics, *([evaluation.gate.metric] if evaluation.gate else [])}
        new_tokens = float(self.block.data.max_new_tokens)
        if not metrics & {"rouge_l", "exact_match", "accuracy", "macro_f1"}:
            number = evaluation.num_samples and max(NUM_TIMED, evaluation.num_samples)
        elif rows.label_tokens is None:
            number = NUM_ANSWERED
        else:
            number = NUM_CLASSIFIED
            new_tokens = min(new_tokens, rows.label_tokens + TOKENS_BEYOND_A_LABEL)
        return min(number, rows.num_test or rows.num_valid), new_tokens

    @property
    def batch_tokens(self) -> int:
        """Most tokens of a micro-batch, unless a single row is longer."""
        return batch_tokens_of(self.block.hyperparameters)


def has_expected_rows(block: Distillation, *, is_same_model: bool) -> bool:
    """Returns whether the loss of a job needs only the expectation of the teacher's logits."""
    objective = block.objective
    is_kl = objective.divergence == "forward_kl" and objective.temperature == 1.0
    is_kl = is_kl and objective.temperature_end in (None, 1.0)
    is_kl = is_kl and (objective.then is None or objective.then.divergence == "forward_kl")
    keeps_head = block.student.freeze_head or block.student.init == "lora"
    is_copied = block.student.init in ("layers", "checkpoint", "lora") and keeps_head
    return objective.teacher_signal == "logits" and is_same_model and is_kl and is_copied
