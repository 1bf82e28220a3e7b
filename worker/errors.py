"""Errors that end a job; each has a code that becomes the job's `error.code`."""


class WorkerError(Exception):
    """Base: the job cannot succeed as it was submitted. The message says what to change."""

    code = "internal_error"


class UnsupportedModel(WorkerError):
    """A model of an architecture, or with an option, that is not supported."""

    code = "unsupported_architecture"


class ImportFailed(WorkerError):
    """Base of the errors of an import."""

    code = "import_failed"


class UnsafeFile(ImportFailed):
    """A file that could run code, or that does not belong into a model."""

    code = "unsafe_file"


class BrokenFile(ImportFailed):
    """A file that is truncated, contradicts itself or cannot be parsed."""

    code = "invalid_model_file"


class MissingFile(ImportFailed):
    """A file without which a model cannot be loaded."""

    code = "missing_model_file"


class UnsupportedTokenizer(ImportFailed):
    """A tokenizer that cannot be loaded or converted."""

    code = "unsupported_tokenizer"


class HubFailed(ImportFailed):
    """The hub does not answer, or not with what was requested."""

    code = "hub_failed"


class DistillError(WorkerError):
    """Base of the errors of a distillation."""

    code = "distillation_failed"


class InvalidTrainingFile(DistillError):
    """A training file with rows that cannot be used."""

    code = "invalid_training_file"


class TokenizerMismatch(DistillError):
    """Teacher and student have different tokenizers, and the method needs the same one."""

    code = "tokenizer_mismatch"


class VocabMismatch(DistillError):
    """A tokenizer and a model, or two models, disagree about the size of the vocabulary."""

    code = "vocab_mismatch"


class StudentTooDeep(DistillError):
    """The student is to have more layers than the model that it is cut from."""

    code = "invalid_value"


class InvalidStudent(DistillError):
    """A student that cannot be built as described."""

    code = "invalid_value"


class NanLoss(DistillError):
    """The loss or the gradients stopped being finite numbers."""

    code = "nan_loss"


class GateFailed(DistillError):
    """No student passed the gate of the job."""

    code = "gate_failed"


class EvaluationFailed(DistillError):
    """A gate could not be checked because the evaluation failed."""

    code = "evaluation_failed"


class DiskFull(DistillError):
    """The disk or its quota is full; the job pauses."""

    code = "disk_full"


class CorruptCheckpoint(DistillError):
    """A checkpoint whose files do not match their checksums."""

    code = "corrupt_checkpoint"


class TeacherGenerationFailed(DistillError):
    """The teacher gave no usable answers."""

    code = "teacher_generation_failed"
