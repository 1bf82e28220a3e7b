"""Errors of the worker's own jobs; each code becomes the job's `error.code`."""


class WorkerError(Exception):
    """Base: the job cannot succeed as asked; the message says what to change."""

    code = "import_failed"


class UnsafeFile(WorkerError):
    """A file that could run code, or that has no business in a model."""

    code = "unsafe_file"


class BrokenFile(WorkerError):
    """A file that is cut short, contradicts itself or cannot be parsed."""

    code = "invalid_model_file"


class MissingFile(WorkerError):
    code = "missing_model_file"


class UnsupportedModel(WorkerError):
    code = "unsupported_architecture"


class UnsupportedTokenizer(WorkerError):
    code = "unsupported_tokenizer"


class HubFailed(WorkerError):
    """The hub does not answer, or not with what was asked for."""

    code = "hub_failed"
