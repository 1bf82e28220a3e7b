"""Errors of the serving package, each with the HTTP status and code of its reply."""

from app.contracts.generation import Failure, Grammar


class ServeError(Exception):
    """Base class for requests that cannot be served. The message says what to change."""

    code = "engine_error"
    status = 500
    param: str | None = None


class InvalidPrompt(ServeError):
    """The prompt is empty, cannot be tokenised, or contains an unknown token."""

    code = "invalid_value"
    status = 400
    param = "prompt"


class InvalidTokens(InvalidPrompt):
    """The tokens of a request to /detokenize cannot be decoded."""

    param = "tokens"


class InvalidMessages(ServeError):
    """The chat template cannot render the messages."""

    code = "invalid_value"
    status = 400
    param = "messages"


class InvalidLogitBias(ServeError):
    """`logit_bias` names a token that is not in the vocabulary."""

    code = "invalid_value"
    status = 400
    param = "logit_bias"


class InvalidStopTokenIds(ServeError):
    """`stop_token_ids` names a token that is not in the vocabulary."""

    code = "invalid_value"
    status = 400
    param = "stop_token_ids"


class InvalidSampling(ServeError):
    """The engine does not support the sampling parameters of the request."""

    code = "unsupported_parameter"
    status = 400


class EchoUnsupported(ServeError):
    """`echo` was sent to an encoder-decoder, whose answer does not continue the prompt."""

    code = "unsupported_parameter"
    status = 400
    param = "echo"


class IgnoreEosUnsupported(ServeError):
    """`ignore_eos` was sent, but the answer follows a grammar and must end with it."""

    code = "unsupported_parameter"
    status = 400
    param = "ignore_eos"


class InvalidGrammar(ServeError):
    """The grammar of the request cannot be compiled, or is too complex for a token of its answer."""

    code = "invalid_grammar"
    status = 400

    def about(self, grammar: Grammar) -> "InvalidGrammar":
        """Returns this error with the parameter that holds the grammar."""
        self.param = grammar.param
        return self


class InvalidAnswer(ServeError):
    """A complete answer does not match the schema of the request."""

    code = "invalid_answer"


class NoChatTemplate(ServeError):
    """The request has messages, but the model has no chat template."""

    code = "no_chat_template"
    status = 400
    param = "messages"


class ToolsUnsupported(ServeError):
    """The chat template does not show tools, or the tool format of the model cannot be enforced."""

    code = "tools_unsupported"
    status = 400
    param = "tools"


class ToolMessagesUnsupported(ToolsUnsupported):
    """The messages have tool calls, but the chat template of the model does not show them."""

    param = "messages"


class ToolChoiceUnsupported(ToolsUnsupported):
    """A tool call is required, but the tool format of the model cannot be enforced."""

    param = "tool_choice"


class PromptTooLong(ServeError):
    """The prompt, with the answer that it asks for, does not fit the context."""

    code = "context_length_exceeded"
    status = 400
    param = "prompt"


class MessagesTooLong(PromptTooLong):
    """The messages, with the answer that they ask for, do not fit the context."""

    param = "messages"


class AnswerTooLong(PromptTooLong):
    """`max_tokens` exceeds the decoder context of an encoder-decoder."""

    param = "max_tokens"


class UnsupportedModel(ServeError):
    """The architecture of the model cannot be served."""

    code = "unsupported_architecture"
    status = 400
    param = "model"


class OptionUnavailable(ServeError):
    """This worker cannot serve the model with its serving options."""

    code = "serving_option_unavailable"
    status = 503
    param = "model"


class DraftUnsupported(ServeError):
    """The draft model cannot be used with this model."""

    code = "unsupported_draft"
    status = 400
    param = "model"


class ModelLoadFailed(ServeError):
    """The model cannot be loaded, for example because files are missing."""

    code = "model_load_failed"
    status = 503
    param = "model"


class ModelTooLarge(ServeError):
    """The model does not fit the memory limit for resident models."""

    code = "model_too_large"
    status = 503
    param = "model"


class ModelLoading(ServeError):
    """The model was not loaded within the time that a request waits for it."""

    code = "model_loading"
    status = 503
    param = "model"


class OutOfMemory(ServeError):
    """The serve worker has too little memory for the request, or for the model, at this time."""

    code = "out_of_memory"
    status = 503


class BadLogits(ServeError):
    """The model computed logits that are NaN or infinite."""

    code = "bad_logits"


class DeadlinePassed(ServeError):
    """The deadline of the request has passed."""

    code = "request_timeout"
    status = 504


def raise_unless_panic(error: BaseException) -> None:
    """Raises `error` again, unless it is a panic of a Rust library.

    A `PanicException` is not an `Exception`. If it propagated, it would end the thread that runs
    all engines.
    """
    if type(error).__name__ != "PanicException":
        raise error


def failure_of(request_id: str, error: ServeError) -> Failure:
    """Returns the reply that reports an error to the client."""
    return Failure(
        id=request_id, status=error.status, code=error.code, message=str(error), param=error.param
    )
