"""Errors of the distillation library; each has a code that becomes the job's `error.code`."""


class DistillError(Exception):
    """Base: the run cannot succeed as asked; the message says what to change."""

    code = "distillation_failed"


class InvalidTrainingFile(DistillError):
    code = "invalid_training_file"


class TokenizerMismatch(DistillError):
    code = "tokenizer_mismatch"


class VocabMismatch(DistillError):
    code = "vocab_mismatch"


class UnsupportedModel(DistillError):
    code = "unsupported_architecture"


class StudentTooDeep(DistillError):
    code = "invalid_value"


class InvalidStudent(DistillError):
    code = "invalid_value"


class NanLoss(DistillError):
    code = "nan_loss"


class GateFailed(DistillError):
    code = "gate_failed"


class EvaluationFailed(DistillError):
    """A gate could not be checked because the evaluation failed."""

    code = "evaluation_failed"


class DiskFull(DistillError):
    code = "disk_full"


class CorruptCheckpoint(DistillError):
    code = "corrupt_checkpoint"


class TeacherGenerationFailed(DistillError):
    code = "teacher_generation_failed"
