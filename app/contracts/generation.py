"""Generation requests to serve workers, and the replies that come back."""

import hashlib
from typing import Annotated, Final, Literal
from uuid import uuid4

from pydantic import Field

from app.contracts.engines import EngineName as EngineName
from app.contracts.engines import EngineOption as EngineOption
from app.contracts.engines import LoadedWeights as LoadedWeights
from app.contracts.engines import WeightsName as WeightsName
from app.contracts.messages import ArtifactRef, Contract


class ToolCall(Contract):
    """Call of a tool that the model has requested. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


class Message(Contract):
    """One message of a chat.

    An assistant message may have tool calls instead of content. A tool message holds the result of
    the call `tool_call_id`.
    """

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Tool(Contract):
    """Function that the model may call. `parameters` is the JSON text of a JSON Schema."""

    name: str
    description: str | None = None
    parameters: str | None = None
    strict: bool = False


class ToolUse(Contract):
    """Tools of a request, and how the model may use them.

    choice: none: it calls no tool. auto: it may call tools. required: it must call one.
    is_parallel: Whether an answer may have several calls.
    """

    tools: tuple[Tool, ...]
    choice: Literal["none", "auto", "required"] = "auto"
    is_parallel: bool = True


class Grammar(Contract):
    """Constraint on the text of an answer. The text is a JSON Schema, a regex or a Lark grammar.

    param: Parameter of the request that holds the grammar. Errors name it.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    param: str = "response_format"


# Types of the sampling parameters that the HTTP bodies share with `Sampling`.
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
TopK = Annotated[int, Field(ge=0, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
RepetitionPenalty = Annotated[float, Field(gt=0.0, le=10.0)]


class Sampling(Contract):
    """Sampling parameters of one request.

    Fields that `app.schemas.completions.GenerationBody` has under the same name are copied from the
    request, unless the client omits them.

    max_tokens: 0 only with `echo`. The answer then is the prompt.
    temperature: 0 is greedy decoding.
    top_k, top_p, min_p: 0, 1 and 0 disable the filters.
    fits_context: Reduces max_tokens to the room that the prompt leaves in the context, instead of
        refusing the request.
    logit_bias: Pairs of a token id and the number that is added to its logit.
    stop_token_ids: More end tokens, beside those of the model. `ignore_eos` does not affect them.
    best_of: Number of choices to generate. Those n with the highest mean log-probability are
        returned.
    echo: The answer begins with the text of the prompt. With `logprobs`, it also has the
        log-probabilities of the prompt's tokens.
    grammar: The answer matches this grammar, unless `max_tokens` ends it.
    """

    max_tokens: Annotated[int, Field(ge=0)] = 16
    fits_context: bool = False
    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Fraction = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: Annotated[int, Field(ge=0)] = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    ignore_eos: bool = False
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool = False
    grammar: Grammar | None = None

    @property
    def scores_prompt(self) -> bool:
        """True if the answer has the log-probabilities of the prompt's tokens."""
        return self.echo and self.logprobs is not None


class Draft(Contract):
    """Smaller model for speculative decoding. It proposes `num_tokens` tokens at a time."""

    model: str
    weights: ArtifactRef
    num_tokens: Annotated[int, Field(ge=1, le=16)] = 4


class ServingOptions(Contract):
    """Options with which a model is served.

    engine: auto: vLLM on a CUDA device, if it is installed there and can serve the model with the
        other options, else transformers.
    weights: int8 weights change some answers, bfloat16 weights fewer. auto: bfloat16 on a CPU that
        supports it natively if there is no draft, else plain.
    draft: Speculative decoding. A draft must not change the answers.
    """

    engine: EngineOption = "transformers"
    weights: WeightsName = "auto"
    draft: Draft | None = None


TaskName = Literal["generate", "tokenize", "detokenize", "describe_tokenizer"]


class GenerateRequest(Contract):
    """One prompt for a serve worker. Exactly one of `text`, `tokens` and `messages` is given.

    Choice i of n, or of best_of, samples with seed + i.

    task: What to reply. tokenize: the tokens of the prompt. detokenize: the text of the tokens.
        describe_tokenizer: the special tokens and the chat template, as JSON text.
    adds_special_tokens: Whether the tokenizer adds its special tokens to `text`. Only for tokenize.
    reply_to: The id of the API process that receives the replies, see `reply_channel`.
    tenant: A worker serves tenants fairly. Empty in requests of API processes of older versions.
    deadline_at: In seconds since the epoch.
    tool_use: Only with `messages`.
    template_kwargs: JSON text of further variables for the chat template.
    traceparent: Context of the client's span, as in W3C Trace Context. Left out of the message
        unless tracing is on, because workers of older versions refuse unknown fields.
    """

    id: str
    task: TaskName = "generate"
    reply_to: str
    tenant: str = ""
    model: str
    weights: ArtifactRef
    serving: ServingOptions = ServingOptions()
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    sampling: Sampling = Sampling()
    deadline_at: float
    tool_use: ToolUse | None = None
    template_kwargs: str = "{}"
    adds_special_tokens: bool = True
    traceparent: str | None = None

    @property
    def num_sequences(self) -> int:
        """Number of choices that are generated. Only n of them are returned."""
        return max(self.n, self.sampling.best_of or 1)

    @property
    def serving_key(self) -> str:
        """Serving key of the engine that answers this request."""
        return serving_key_of(self.weights.key, self.serving)


def serving_key_of(store_key: str, serving: ServingOptions) -> str:
    """Returns the serving key: the name of these weights with these serving options.

    With default options it is the weights' key in the artifact store.
    """
    if serving == ServingOptions():
        return store_key
    digest = hashlib.sha256(serving.model_dump_json().encode()).hexdigest()[:12]
    return f"{store_key}#{digest}"


def store_key_of(serving_key: str) -> str:
    """Returns the weights' key in the artifact store that a serving key contains."""
    return serving_key.partition("#")[0]


class TokenLogprob(Contract):
    """Log-probability of a token, and those of the most likely tokens in its place.

    It is None for the first token of an echoed prompt, which nothing precedes.
    """

    token: str
    logprob: float | None
    bytes: tuple[int, ...]
    top: tuple[tuple[str, float], ...] = ()


class ToolCallDelta(Contract):
    """New part of a tool call of one choice. The first part of a call has its id and its name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Delta(Contract):
    """Reply with the new text of one choice since the previous delta.

    Text is held back while later tokens may still change it. The last delta of a choice has a
    finish_reason.
    """

    kind: Literal["delta"] = "delta"
    id: str
    choice: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None

    @property
    def num_entries(self) -> int:
        """Number of tokens and log-probabilities plus one: the cost of parsing and serialising."""
        return 1 + len(self.tokens) + sum(1 + len(entry.top) for entry in self.logprobs or ())


class Done(Contract):
    """Last reply to a prompt whose choices are all complete.

    cached_tokens: Number of prompt tokens that were in the prefix cache.
    """

    kind: Literal["done"] = "done"
    id: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Failure(Contract):
    """Last reply to a prompt that failed.

    `status` is the HTTP status of the response if none of it has been sent yet.
    """

    kind: Literal["failure"] = "failure"
    id: str
    status: int
    code: str
    message: str
    param: str | None = None


Reply = Annotated[Delta | Done | Failure, Field(discriminator="kind")]
# Parsing a batch blocks the event loop of the API process, so its number of entries is bounded.
MAX_ENTRIES_PER_BATCH: Final = 2048


class ReplyBatch(Contract):
    """Replies of one engine step to one API process. Many replies are divided into batches.

    A batch may arrive twice, because publishing is retried. Its id identifies duplicates.
    """

    id: str = Field(default_factory=lambda: uuid4().hex)
    replies: tuple[Reply, ...]
