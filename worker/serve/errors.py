"""Errors of the serving library; each knows the reply its request ends with."""

from app.contracts.messages import Failure


class ServeError(Exception):
    """Base: the request cannot be served as asked; the message says what to change."""

    code = "engine_error"
    status = 500
    param: str | None = None


class InvalidPrompt(ServeError):
    code = "invalid_value"
    status = 400
    param = "prompt"


class InvalidMessages(ServeError):
    code = "invalid_value"
    status = 400
    param = "messages"


class InvalidLogitBias(ServeError):
    code = "invalid_value"
    status = 400
    param = "logit_bias"


class InvalidSampling(ServeError):
    code = "unsupported_parameter"
    status = 400


class EchoUnsupported(ServeError):
    code = "unsupported_parameter"
    status = 400
    param = "echo"


class NoChatTemplate(ServeError):
    code = "no_chat_template"
    status = 400
    param = "messages"


class PromptTooLong(ServeError):
    code = "context_length_exceeded"
    status = 400
    param = "prompt"


class MessagesTooLong(PromptTooLong):
    param = "messages"


class AnswerTooLong(PromptTooLong):
    param = "max_tokens"


class UnsupportedModel(ServeError):
    code = "unsupported_architecture"
    status = 400
    param = "model"


class OptionUnavailable(ServeError):
    """How the model is to be served is not possible on this worker."""

    code = "serving_option_unavailable"
    status = 503
    param = "model"


class DraftUnsupported(ServeError):
    code = "unsupported_draft"
    status = 400
    param = "model"


class ModelLoadFailed(ServeError):
    code = "model_load_failed"
    status = 503
    param = "model"


class ModelTooLarge(ServeError):
    code = "model_too_large"
    status = 503
    param = "model"


class ModelLoading(ServeError):
    code = "model_loading"
    status = 503
    param = "model"


class BadLogits(ServeError):
    code = "bad_logits"


class DeadlinePassed(ServeError):
    code = "request_timeout"
    status = 504


def raise_unless_panic(error: BaseException) -> None:
    """Raises it again, unless a Rust library panicked: that is no Exception, and would end the thread of all engines."""
    if type(error).__name__ != "PanicException":
        raise error


def failure_of(request_id: str, error: ServeError) -> Failure:
    """The reply that tells a caller about an error."""
    return Failure(
        id=request_id, status=error.status, code=error.code, message=str(error), param=error.param
    )
