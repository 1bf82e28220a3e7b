"""What crosses the queue, the reply channel and the job row: plain frozen data, no tensors, no paths, no ORM.

The distillation block is here too, because the API validates it and the trainer obeys it.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RING_TASK = "train.ring"
GENERATE_TASK = "serve.generate"
TRAIN_QUEUE = "train"


def serve_queue(worker_id: str) -> str:
    """Celery queue of one serve worker."""
    return f"serve.{worker_id}"


def control_channel(worker_id: str) -> str:
    """Pub/sub channel on which one serve worker hears cancellations."""
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

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl"]
Auto = Literal["auto"]


class Student(Contract):
    """Where the student comes from: layers of the teacher, or a registered checkpoint."""

    init: Literal["layers", "checkpoint"] = "layers"
    num_layers: Annotated[int, Field(ge=1, le=1024)] | None = None
    layers: tuple[Annotated[int, Field(ge=0, le=1023)], ...] | None = None
    freeze_head: bool = True

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> "Student":
        if self.init == "checkpoint" and (self.num_layers is not None or self.layers is not None):
            raise ValueError("num_layers and layers belong to init=layers; a checkpoint keeps its own layers")
        if self.layers is not None:
            if self.num_layers is not None and self.num_layers != len(self.layers):
                raise ValueError("give num_layers or layers, not two different counts")
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ValueError(
                    "layers must be a rising list of distinct teacher layer numbers, counted from 0"
                )
        return self


class Data(Contract):
    """Where completions come from; null means: from the file if it has them, else from the teacher."""

    completions: Literal["dataset", "teacher"] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 128
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.7
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


class Phase(Contract):
    """The divergence from a fraction `at` of the steps onwards."""

    divergence: DivergenceName
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    at: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5


class Objective(Contract):
    divergence: DivergenceName = "forward_kl"
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    temperature: Annotated[float, Field(ge=0.1, le=20.0)] = 1.0
    ce_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    then: Phase | None = None


class EarlyStopping(Contract):
    """Stop when `metric` has not improved for `patience` evaluations."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    metric: Literal["kl", "perplexity", "agreement"] = "kl"


class Hyperparameters(Contract):
    n_epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    batch_tokens: Annotated[int, Field(ge=16, le=1_000_000)] | Auto = "auto"
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | Auto = "auto"
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    warmup_ratio: Annotated[float, Field(ge=0.0, le=0.9)] = 0.03
    max_grad_norm: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    max_sequence_tokens: Annotated[int, Field(ge=8, le=131_072)] = 512
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    checkpoint_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = "auto"
    eval_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = "auto"
    early_stopping: EarlyStopping | None = None


Metric = Literal["perplexity", "agreement", "rouge_l", "speed"]


class Evaluation(Contract):
    """Held-out KL and loss are always measured; `metrics` names what is measured beside them."""

    metrics: tuple[Metric, ...] = ("perplexity", "agreement", "rouge_l", "speed")
    num_samples: Annotated[int, Field(ge=0, le=64)] = 4


LOSS_NAMES = {"fkl": "forward_kl", "rkl": "reverse_kl", "skew_fkl": "skew_forward_kl"}


class Distillation(Contract):
    """The block `method.distillation` of a job."""

    teacher: Annotated[str, Field(min_length=1, max_length=200)]
    student: Student = Student()
    data: Data = Data()
    objective: Objective = Objective()
    hyperparameters: Hyperparameters = Hyperparameters()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="before")
    @classmethod
    def _read_loss(cls, block: Any) -> Any:  # Any: the JSON as it came
        """`"loss": {"type": "fkl", "temperature": 2}` is the short way to write the objective."""
        if not isinstance(block, dict) or not isinstance(block.get("loss"), dict):
            return block
        if "objective" in block:
            raise ValueError("give objective or loss, not both: loss is the short way to write the objective")
        objective = dict(block["loss"])
        if "type" in objective:
            kind = objective.pop("type")
            objective["divergence"] = LOSS_NAMES.get(kind, kind) if isinstance(kind, str) else kind
        return {**{name: block[name] for name in block if name != "loss"}, "objective": objective}


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
    output_model: str
    seed: int


class ImportJob(Contract):
    """Spec of a job of kind `import`: `staged` was copied into the store, `hub` is org/name@revision."""

    kind: Literal["import"] = "import"
    output_model: str
    staged: ArtifactRef | None = None
    hub: str | None = None
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


class ModelFacts(Contract):
    """What the control plane must know of a model, so that it never has to load one."""

    architecture: str
    family: Literal["causal"] = "causal"
    num_layers: int
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
    """How one request picks tokens. temperature 0 is greedy; top_k 0 and top_p 1 switch the filters off.

    fits_context: max_tokens is cut to what the context leaves beside the prompt, instead of a refusal.
    """

    max_tokens: Annotated[int, Field(ge=1)] = 16
    fits_context: bool = False
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    ignore_eos: bool = False


class GenerateRequest(Contract):
    """One prompt for a serve worker; exactly one of text, tokens and messages is given.

    Choice i of n samples with seed + i. deadline_at is in seconds since the epoch.
    """

    id: str
    reply_to: str
    model: str
    weights: ArtifactRef
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    sampling: Sampling = Sampling()
    deadline_at: float


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


class ReplyBatch(Contract):
    """One publish: everything one engine step has for one API process."""

    replies: tuple[Reply, ...]


class Cancel(Contract):
    """Sent on a serve worker's control channel."""

    id: str


class ServeWorkerStatus(Contract):
    """A serve worker's heartbeat."""

    worker_id: str
    resident: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    num_running: int = 0
    num_waiting: int = 0
    max_running: int
    is_draining: bool = False
    last_step_at: float | None = None
    beat_at: float


class JobFailure(Contract):
    """Why a job failed: what the public `error` object shows."""

    code: str
    message: str
    param: str | None = None


JsonObject = dict[str, Any]  # Any: metrics and results are open-ended JSON by design
