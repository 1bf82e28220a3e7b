"""Control messages to serve workers, and the heartbeats of these workers.

Requests do not use this channel but the worker's queue.
"""

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, TypeAdapter

from app.contracts.generation import (
    EngineName,
    EngineOption,
    LoadedWeights,
    ServingOptions,
    serving_key_of,
)
from app.contracts.messages import ArtifactRef, Contract

# Messages call a serving key `residence`, because processes of older versions know this name.
ServingKey = Annotated[
    str,
    Field(
        validation_alias=AliasChoices("serving_key", "residence"), serialization_alias="residence"
    ),
]


class ServedModel(Contract):
    """A model version with its serving options, as a serve worker loads it."""

    model: str
    weights: ArtifactRef
    serving: ServingOptions = ServingOptions()

    @property
    def serving_key(self) -> str:
        """Serving key under which a worker keeps the model loaded."""
        return serving_key_of(self.weights.key, self.serving)

    @property
    def stored_bytes(self) -> int:
        """Size of all folders that are read to load the model, including its draft."""
        draft = self.serving.draft
        return self.weights.bytes + (draft.weights.bytes if draft else 0)


class Load(Contract):
    """Message that loads a model before its first request. No effect if it is already loaded."""

    kind: Literal["load"] = "load"
    served: ServedModel


class Unload(Contract):
    """Message that frees a model's memory once its answers in progress have ended."""

    kind: Literal["unload"] = "unload"
    serving_key: ServingKey


class Keep(Contract):
    """Message that lists all pinned models, and replaces the previous list.

    A worker loads pinned models and never evicts them for other models.
    """

    kind: Literal["keep"] = "keep"
    models: tuple[ServedModel, ...]


class Cancel(Contract):
    """Control message that stops a request. The worker sends no reply."""

    kind: Literal["cancel"] = "cancel"
    id: str


Control = Annotated[Cancel | Load | Unload | Keep, Field(discriminator="kind")]
CONTROL: TypeAdapter[Cancel | Load | Unload | Keep] = TypeAdapter(Control)


class ModelState(Contract):
    """State of one model on one serve worker.

    bytes: Size in memory if resident, else size in the artifact store.
    percent: Progress of the load.
    weights: The format in which the weights were loaded.
    first_token_seconds: Time to the first token of a short prompt, measured alone after the load.
    acceptance_rate: Share of the draft's tokens that were accepted so far; None without a draft.
    """

    serving_key: ServingKey
    state: Literal["loading", "resident", "failed"]
    bytes: int
    percent: float = 0.0
    weights: LoadedWeights | None = None
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    acceptance_rate: float | None = None
    is_pinned: bool = False
    error: str | None = None


class EngineLoad(Contract):
    """Load of the engines that serve one model on one worker, for the metrics of the API.

    num_running, num_waiting: Number of sequences.
    kv_cache_usage: Used fraction of the KV cache, from 0 to 1.
    num_prefix_queries, num_prefix_hits: Prompt tokens that were looked up in the prefix cache, and
        those that were found there, since the model was loaded.
    """

    model: str
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0


class ServeWorkerStatus(Contract):
    """Heartbeat of a serve worker.

    engines: Engines whose packages are installed.
    resident_bytes: Limit for the memory of its models. None: a worker of an older version.
    loads: One entry per model. Empty: a worker of an older version, or one without models.
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
    loads: tuple[EngineLoad, ...] = ()
    num_running: int = 0
    num_waiting: int = 0
    requests: frozenset[str] | None = None
    max_running: int
    resident_bytes: int | None = None
    is_draining: bool = False
    last_step_at: float | None = None
    stalled_seconds: float = 0.0
    beat_at: float

    def can_serve(self, engine: EngineOption) -> bool:
        """Returns whether the worker can serve models with this engine option."""
        return engine == "auto" or engine in self.engines
