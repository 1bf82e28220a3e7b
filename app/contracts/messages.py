"""Messages in the queues and on the reply channel, and the specifications stored with jobs.

They are plain immutable data, without tensors, paths or ORM objects.
"""

import hashlib
from enum import StrEnum
from typing import Annotated, Any, Final, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from app.contracts.distillation import Distillation

SPLIT_VERSION = 2  # version of the rule that selects held-out rows, worker/distill/data/split.py
WAKE_UP_TASK = "train.ring"
GENERATE_TASK = "serve.generate"
TRAIN_QUEUE = "train"


def serve_queue(worker_id: str) -> str:
    """Returns the name of a serve worker's Celery queue."""
    return f"serve.{worker_id}"


def control_channel(worker_id: str) -> str:
    """Returns the pub/sub channel of a serve worker for the messages of `app.contracts.control`."""
    return f"stillhouse:control:{worker_id}"


def reply_channel(api_id: str) -> str:
    """Returns the pub/sub channel on which an API process receives replies."""
    return f"stillhouse:reply:{api_id}"


def serve_worker_key(worker_id: str) -> str:
    """Returns the Redis key of a serve worker's heartbeat, a `ServeWorkerStatus` with a TTL."""
    return f"stillhouse:serve:{worker_id}"


class Contract(BaseModel):
    """Base class of messages: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class JobStatus(StrEnum):
    """States of a job. The API shows `retry_wait` as `queued`."""

    queued = "queued"
    running = "running"
    retry_wait = "retry_wait"
    paused = "paused"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


TERMINAL = frozenset({JobStatus.succeeded, JobStatus.failed, JobStatus.cancelled})


class ArtifactRef(Contract):
    """Reference to a file or a folder in the artifact store."""

    key: str
    bytes: int
    sha256: str | None = None


class DistillationJob(Contract):
    """Specification of a distillation job.

    References are resolved when the job is submitted, and the result is stored in the job's row.
    """

    kind: Literal["distillation"] = "distillation"
    distillation: Distillation
    teacher: ArtifactRef
    start: ArtifactRef
    training_file: ArtifactRef
    validation_file: ArtifactRef | None = None
    test_file: ArtifactRef | None = None
    split_version: int = 1  # jobs that were submitted without a version keep their held-out rows
    output_model: str
    seed: int


class ImportJob(Contract):
    """Specification of an import job.

    The source is `staged`, a folder or file that was copied into the store, or `hub`, which has the
    form org/name@revision. `uses_hub_token` is true by default for jobs that were queued before the
    field existed.
    """

    kind: Literal["import"] = "import"
    output_model: str
    staged: ArtifactRef | None = None
    hub: str | None = None
    uses_hub_token: bool = True
    format: Literal["folder", "gguf", "hub"]


JobSpec = Annotated[DistillationJob | ImportJob, Field(discriminator="kind")]


class ChatCost(Contract):
    """Number of tokens that a model's chat template adds to the contents of a chat.

    With these numbers, the tokens of a chat can be counted without running the template.

    first: Added by the first user turn, including the text that begins the answer.
    end: Added after the last answer.
    user, assistant: Added by each further turn.
    system: Added by a system message. Negative if the message replaces a longer default.
    """

    first: int
    end: int
    user: int
    assistant: int
    system: int


ModelKind = Literal["causal", "seq2seq", "masked"]


class ModelFacts(Contract):
    """Properties of a model that the API needs, so that it never has to load the model."""

    architecture: str
    family: ModelKind = "causal"
    num_layers: int  # decoder layers, for an encoder-decoder
    num_encoder_layers: int | None = None
    num_decoder_layers: int | None = None
    hidden_size: int
    vocab_size: int
    context_tokens: int
    num_parameters: int
    tokenizer_sha256: str
    has_chat_template: bool
    chat_cost: ChatCost | None = None
    weights_bytes: int
    weights_sha256: str


class Message(Contract):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: str


# Types of the sampling parameters that the HTTP bodies share with `Sampling`.
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
TopK = Annotated[int, Field(ge=0, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
RepetitionPenalty = Annotated[float, Field(gt=0.0, le=10.0)]


class Sampling(Contract):
    """Sampling parameters of one request.

    A field that also is in `app.schemas.completions.GenerationBody`, under the same name, is copied
    from there unless the client leaves it out.

    temperature: 0 is greedy decoding.
    top_k, top_p, min_p: 0, 1 and 0 disable the filters.
    fits_context: Reduces max_tokens to what fits the context, instead of refusing the request.
    logit_bias: Pairs of a token id and the number that is added to its logit.
    stop_token_ids: More end tokens, beside those of the model. `ignore_eos` does not affect them.
    best_of: Choices to generate. The n with the highest mean log-probability are returned.
    echo: The answer begins with the text of the prompt.
    """

    max_tokens: Annotated[int, Field(ge=1)] = 16
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


class Draft(Contract):
    """Smaller model for speculative decoding. It proposes `num_tokens` tokens at a time."""

    model: str
    weights: ArtifactRef
    num_tokens: Annotated[int, Field(ge=1, le=16)] = 4


EngineName = Literal["transformers", "vllm"]
LoadedWeights = Literal["plain", "bfloat16", "int8"]
WeightsName = Literal["auto", "plain", "bfloat16", "int8"]


class ServingOptions(Contract):
    """Options with which a model is served.

    weights: int8 weights change some answers, bfloat16 weights fewer. auto: bfloat16 on a CPU that
        supports it natively if there is no draft, else plain.
    draft: Speculative decoding. A draft must not change the answers.
    """

    engine: EngineName = "transformers"
    weights: WeightsName = "auto"
    draft: Draft | None = None


class GenerateRequest(Contract):
    """One prompt for a serve worker. Exactly one of `text`, `tokens` and `messages` is given.

    Choice i of n, or of best_of, samples with seed + i.

    reply_to: The id of the API process that receives the replies, see `reply_channel`.
    tenant: A worker serves tenants fairly. Empty in requests of API processes of older versions.
    deadline_at: In seconds since the epoch.
    """

    id: str
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

    @property
    def num_sequences(self) -> int:
        """Number of choices that are generated. Only n of them are returned."""
        return max(self.n, self.sampling.best_of or 1)

    @property
    def residence(self) -> str:
        """Serving key of the engine that answers this request."""
        return residence_of(self.weights, self.serving)


def residence_of(weights: ArtifactRef, serving: ServingOptions) -> str:
    """Returns the serving key: the name of these weights with these serving options.

    With default options it is the weights' key in the artifact store.
    """
    if serving == ServingOptions():
        return weights.key
    digest = hashlib.sha256(serving.model_dump_json().encode()).hexdigest()[:12]
    return f"{weights.key}#{digest}"


class TokenLogprob(Contract):
    """Log-probability of a generated token, and those of the most likely tokens in its place."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top: tuple[tuple[str, float], ...] = ()


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
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def num_entries(self) -> int:
        """Number of tokens and log-probabilities plus one: the cost of parsing and serialising."""
        return 1 + len(self.tokens) + sum(1 + len(entry.top) for entry in self.logprobs or ())


class Done(Contract):
    """Last reply to a prompt whose choices are all complete."""

    kind: Literal["done"] = "done"
    id: str
    prompt_tokens: int
    completion_tokens: int


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


class Cancel(Contract):
    """Control message that stops a request. The worker sends no reply."""

    kind: Literal["cancel"] = "cancel"
    id: str


class ModelState(Contract):
    """State of one model on one serve worker.

    bytes: Size in memory if resident, else size in the artifact store.
    percent: Progress of the load.
    weights: The format in which the weights were loaded.
    first_token_seconds: Time to the first token of a short prompt, measured alone after the load.
    acceptance_rate: Share of the draft's tokens that were accepted so far; None without a draft.
    """

    residence: str
    state: Literal["loading", "resident", "failed"]
    bytes: int
    percent: float = 0.0
    weights: LoadedWeights | None = None
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    acceptance_rate: float | None = None
    is_pinned: bool = False
    error: str | None = None


class ServeWorkerStatus(Contract):
    """Heartbeat of a serve worker.

    engines: Engines whose packages are installed.
    resident, loading: Serving keys.
    requests: Ids of the requests whose last reply has not been sent. None: a worker of an older
        version, which does not list them.
    last_step_at: End of the last forward pass in seconds since the epoch; None before the first.
    stalled_seconds: How long the worker has had work without a forward pass.
    """

    worker_id: str
    engines: tuple[EngineName, ...] = ("transformers",)
    resident: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    models: tuple[ModelState, ...] = ()
    num_running: int = 0
    num_waiting: int = 0
    requests: frozenset[str] | None = None
    max_running: int
    is_draining: bool = False
    last_step_at: float | None = None
    stalled_seconds: float = 0.0
    beat_at: float


class JobFailure(Contract):
    """Reason why a job failed, shown as the `error` of the job."""

    code: str
    message: str
    param: str | None = None


JsonObject = dict[str, Any]  # Any: metrics and results are open-ended JSON by design
