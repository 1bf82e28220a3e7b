"""Names of queues and channels, and the specifications stored with jobs.

They are plain immutable data, without tensors, paths or ORM objects.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.contracts.datasets import DatasetJob
from app.contracts.distillation import Distillation

SPLIT_VERSION = 2  # version of the rule that selects held-out rows, worker/distill/data/split.py
WAKE_UP_TASK = "train.ring"
GENERATE_TASK = "serve.generate"
TRAIN_QUEUE = "train"
ADAPTER_BASE = "adapter_base.json"


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

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


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


class AdapterBase(Contract):
    """Start model of LoRA adapters, and the dtype of the weights into which they are merged.

    A folder that holds adapters in place of weights has it in a file, `ADAPTER_BASE`. Without the
    service, a run does not know `start`.
    """

    start: ArtifactRef | None
    dtype: Literal["float32", "bfloat16", "float16"]


def read_adapter_base(folder: Path) -> AdapterBase | None:
    """Returns the start model of the adapters in a folder, or None if it holds a plain model."""
    path = folder / ADAPTER_BASE
    return AdapterBase.model_validate_json(path.read_bytes()) if path.exists() else None


MethodName = Literal["distillation", "supervised"]


class DistillationJob(Contract):
    """Specification of a training job.

    References are resolved when the job is submitted, and the result is stored in the job's row.

    method: supervised: cross-entropy on the rows, without a teacher. `teacher` is then the start
        model, and is not loaded.
    """

    kind: Literal["distillation"] = "distillation"
    method: MethodName = "distillation"
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
    form org/name@revision. An `archive` is a tar or zip file with the files of a folder.
    `uses_hub_token` is true by default for jobs that were queued before the field existed.
    """

    kind: Literal["import"] = "import"
    output_model: str
    staged: ArtifactRef | None = None
    hub: str | None = None
    uses_hub_token: bool = True
    format: Literal["folder", "gguf", "archive", "hub"]


AnyJob = DistillationJob | ImportJob | DatasetJob
JobSpec = Annotated[AnyJob, Field(discriminator="kind")]


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
    """Properties of a model that the API needs, so that it never has to load the model.

    takes_tools: Whether the chat template shows tools. None for models of older versions.
    """

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
    takes_tools: bool | None = None
    chat_cost: ChatCost | None = None
    weights_bytes: int
    weights_sha256: str


class JobFailure(Contract):
    """Reason why a job failed, shown as the `error` of the job."""

    code: str
    message: str
    param: str | None = None


JsonObject = dict[str, Any]  # Any: metrics and results are open-ended JSON by design
