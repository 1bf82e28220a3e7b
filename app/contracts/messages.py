"""What crosses the queue, the reply channel and the job row: plain frozen data, no tensors, no paths, no ORM."""

import hashlib
from enum import StrEnum
from typing import Annotated, Any, Final, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from app.contracts.distillation import Distillation

SPLIT_VERSION = 2  # how held-out rows are chosen, see worker/distill/data/split.py
WAKE_UP_TASK = "train.ring"
GENERATE_TASK = "serve.generate"
TRAIN_QUEUE = "train"


def serve_queue(worker_id: str) -> str:
    """Celery queue of one serve worker."""
    return f"serve.{worker_id}"


def control_channel(worker_id: str) -> str:
    """Pub/sub channel on which one serve worker hears the messages of `app/contracts/control.py`."""
    return f"stillhouse:control:{worker_id}"


def reply_channel(api_id: str) -> str:
    """Pub/sub channel on which one API process hears tokens."""
    return f"stillhouse:reply:{api_id}"


def serve_worker_key(worker_id: str) -> str:
    """Key that holds a serve worker's `ServeWorkerStatus` while it lives (it has a TTL)."""
    return f"stillhouse:serve:{worker_id}"


class Contract(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JobStatus(StrEnum):
    """States of a job. `retry_wait` is shown to the public as `queued`."""

    queued = "queued"
    running = "running"
    retry_wait = "retry_wait"
    paused = "paused"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


TERMINAL = frozenset({JobStatus.succeeded, JobStatus.failed, JobStatus.cancelled})


class ArtifactRef(Contract):
    """Something in the artifact store: a file or a folder of files."""

    key: str
    bytes: int
    sha256: str | None = None


class DistillationJob(Contract):
    """Spec of a job of kind `distillation`, resolved at submission and kept in the job row."""

    kind: Literal["distillation"] = "distillation"
    distillation: Distillation
    teacher: ArtifactRef
    start: ArtifactRef
    training_file: ArtifactRef
    validation_file: ArtifactRef | None = None
    test_file: ArtifactRef | None = None
    split_version: int = 1  # jobs submitted before there were versions keep their held-out rows
    output_model: str
    seed: int


class ImportJob(Contract):
    """Spec of a job of kind `import`: `staged` was copied into the store, `hub` is org/name@revision.

    `uses_hub_token` is true by default for jobs that were queued before the field existed.
    """

    kind: Literal["import"] = "import"
    output_model: str
    staged: ArtifactRef | None = None
    hub: str | None = None
    uses_hub_token: bool = True
    format: Literal["folder", "gguf", "hub"]


JobSpec = Annotated[DistillationJob | ImportJob, Field(discriminator="kind")]


class ChatCost(Contract):
    """Tokens a model's chat template adds to the contents of a chat, so that nobody must run it to count.

    `first` is a user turn with what begins the answer; `user` and `assistant` are each such turn beside it;
    `end` is what follows the last answer; `system` is what a system message of the chat's own adds (less than
    nothing where it replaces a default one).
    """

    first: int
    end: int
    user: int
    assistant: int
    system: int


ModelKind = Literal["causal", "seq2seq", "masked"]


class ModelFacts(Contract):
    """What the control plane must know of a model, so that it never has to load one."""

    architecture: str
    family: ModelKind = "causal"
    num_layers: int  # the decoder's, where there are two kinds
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
    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: str


class Sampling(Contract):
    """How one request picks tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch the filters off.

    fits_context: max_tokens is cut to what the context leaves beside the prompt, instead of a refusal.
    logit_bias: pairs of a token and what is added to its logit. best_of: so many choices are written, and the n
    with the highest mean log-probability given. echo: the prompt's text comes first.
    """

    max_tokens: Annotated[int, Field(ge=1)] = 16
    fits_context: bool = False
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: Annotated[int, Field(ge=0)] = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    ignore_eos: bool = False
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool = False


class Draft(Contract):
    """A smaller model that proposes tokens which the model then verifies, `num_tokens` at a time."""

    model: str
    weights: ArtifactRef
    num_tokens: Annotated[int, Field(ge=1, le=16)] = 4


EngineName = Literal["transformers", "vllm"]
LoadedWeights = Literal["plain", "bfloat16", "int8"]
WeightsName = Literal["auto", "plain", "bfloat16", "int8"]


class ServingOptions(Contract):
    """How a model is served. int8 weights cost some agreement, bfloat16 ones little; a draft costs none.

    auto: bfloat16 on a CPU that multiplies it itself, unless there is a draft, which may change nothing; else plain.
    """

    engine: EngineName = "transformers"
    weights: WeightsName = "auto"
    draft: Draft | None = None


class GenerateRequest(Contract):
    """One prompt for a serve worker; exactly one of text, tokens and messages is given.

    Choice i of n, or of best_of, samples with seed + i. deadline_at is in seconds since the epoch.
    tenant: whose request it is; a worker serves tenants fairly. An API process of an older version leaves it out.
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
        """Choices that are written, of which n are given."""
        return max(self.n, self.sampling.best_of or 1)

    @property
    def residence(self) -> str:
        """What a serve worker keeps loaded for this request: weights, and how they are served if that is not the plain way."""
        return residence_of(self.weights, self.serving)


def residence_of(weights: ArtifactRef, serving: ServingOptions) -> str:
    """The name under which a serve worker keeps these weights, served this way."""
    if serving == ServingOptions():
        return weights.key
    digest = hashlib.sha256(serving.model_dump_json().encode()).hexdigest()[:12]
    return f"{weights.key}#{digest}"


class TokenLogprob(Contract):
    token: str
    logprob: float
    bytes: tuple[int, ...]
    top: tuple[tuple[str, float], ...] = ()


class Delta(Contract):
    """Text that became certain for one choice since the last delta; the last one carries finish_reason."""

    kind: Literal["delta"] = "delta"
    id: str
    choice: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def num_entries(self) -> int:
        """The tokens and log-probabilities it holds, plus one: how much work it is to parse and to serialise."""
        return 1 + len(self.tokens) + sum(1 + len(entry.top) for entry in self.logprobs or ())


class Done(Contract):
    kind: Literal["done"] = "done"
    id: str
    prompt_tokens: int
    completion_tokens: int


class Failure(Contract):
    """The request ends here; status is the HTTP status it has if nothing was sent yet."""

    kind: Literal["failure"] = "failure"
    id: str
    status: int
    code: str
    message: str
    param: str | None = None


Reply = Annotated[Delta | Done | Failure, Field(discriminator="kind")]

# The event loop of an API process stands still while it parses a batch of replies, which takes about 3 us per entry.
MAX_ENTRIES_PER_BATCH: Final = 2048


class ReplyBatch(Contract):
    """One publish: what one engine step has for one API process, or a part of it if that is large.

    A publish that is tried again may come twice.
    """

    id: str = Field(default_factory=lambda: uuid4().hex)
    replies: tuple[Reply, ...]


class Cancel(Contract):
    """Stops a request without a reply; one of the messages of `app/contracts/control.py`."""

    kind: Literal["cancel"] = "cancel"
    id: str


class ModelState(Contract):
    """What one serve worker has of one model.

    bytes: in memory when resident, in the store before. weights: what they were loaded as. first_token_seconds: of a short
    prompt, alone, after the load. acceptance_rate: of the draft's tokens so far, where there is a draft.
    """

    residence: str
    state: Literal["loading", "resident", "failed"]
    bytes: int
    percent: float = 0.0  # of the load
    weights: LoadedWeights | None = None
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    acceptance_rate: float | None = None
    is_pinned: bool = False
    error: str | None = None


class ServeWorkerStatus(Contract):
    """A serve worker's heartbeat. `engines` are those whose packages it has, `requests` those whose end it has not told.

    last_step_at is the end of the last forward pass, or None before the first; stalled_seconds is how long there has been
    work without one.
    """

    worker_id: str
    engines: tuple[EngineName, ...] = ("transformers",)
    resident: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    models: tuple[ModelState, ...] = ()
    num_running: int = 0
    num_waiting: int = 0
    requests: frozenset[str] | None = None  # None: a worker of before does not say
    max_running: int
    is_draining: bool = False
    last_step_at: float | None = None
    stalled_seconds: float = 0.0
    beat_at: float


class JobFailure(Contract):
    """Why a job failed: what the public `error` object shows."""

    code: str
    message: str
    param: str | None = None


JsonObject = dict[str, Any]  # Any: metrics and results are open-ended JSON by design
