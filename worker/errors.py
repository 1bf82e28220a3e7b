"""Errors that end a job. The `code` of an error becomes the job's `error.code`."""


class WorkerError(Exception):
    """Base class: the job cannot succeed as submitted. The message says what to change.

    Subclasses set `code`.
    """

    code: str


class UnsupportedModel(WorkerError):
    """The architecture or an option of a model is not supported."""

    code = "unsupported_architecture"


class ImportFailed(WorkerError):
    """Base class of the errors of an import."""

    code = "import_failed"


class UnsafeFile(ImportFailed):
    """A file could run code, or is not part of a model."""

    code = "unsafe_file"


class BrokenFile(ImportFailed):
    """A file is truncated, inconsistent or cannot be parsed."""

    code = "invalid_model_file"


class MissingFile(ImportFailed):
    """A file that is needed to load the model is missing."""

    code = "missing_model_file"


class UnsupportedTokenizer(ImportFailed):
    """The tokenizer cannot be loaded or converted."""

    code = "unsupported_tokenizer"


class HubFailed(ImportFailed):
    """The hub cannot be reached, or does not deliver the requested model."""

    code = "hub_failed"


class DistillError(WorkerError):
    """Base class of the errors of a distillation."""

    code = "distillation_failed"


class InvalidTrainingFile(DistillError):
    """The training file has rows that cannot be used."""

    code = "invalid_training_file"


class TokenizerMismatch(DistillError):
    """Teacher and student have different tokenizers, but the method needs the same one."""

    code = "tokenizer_mismatch"


class VocabMismatch(DistillError):
    """A tokenizer and a model, or two models, have different vocabulary sizes."""

    code = "vocab_mismatch"


class StudentTooDeep(DistillError):
    """The student should have more layers than the model that its layers are copied from."""

    code = "invalid_value"


class InvalidStudent(DistillError):
    """The student cannot be built as described."""

    code = "invalid_value"


class NanLoss(DistillError):
    """The loss or a gradient is NaN or infinite."""

    code = "nan_loss"


class GateFailed(DistillError):
    """No student passed the gate of the job."""

    code = "gate_failed"


class EvaluationFailed(DistillError):
    """A gate could not be checked because the evaluation failed."""

    code = "evaluation_failed"


class TooFewDevices(WorkerError):
    """The job asks for more CUDA devices than its worker has."""

    code = "too_few_devices"


class UnsupportedPrecision(WorkerError):
    """The worker of the job, or the teacher, does not support `teacher_precision` of the job."""

    code = "unsupported_precision"


class DiskFull(DistillError):
    """The disk is full during an import or the creation of a data set. Training jobs pause instead."""

    code = "disk_full"


class EmptyDataset(WorkerError):
    """No training row is left of the completions that were selected for a data set."""

    code = "empty_dataset"


class CorruptCheckpoint(DistillError):
    """The files of a checkpoint do not match their checksums."""

    code = "corrupt_checkpoint"


class TeacherGenerationFailed(DistillError):
    """The teacher generated no usable answers."""

    code = "teacher_generation_failed"
