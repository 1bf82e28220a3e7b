"""Request and response bodies of /v1/models/{id}/serving, /status, /load, /unload, /pin, /unpin."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.contracts.generation import EngineOption, LoadedWeights, ServingOptions, WeightsName
from app.schemas.jobs import Body, ModelId


class SetDraft(Body):
    """Draft model, and the number of tokens that it proposes at a time."""

    model: ModelId
    num_tokens: Annotated[int, Field(ge=1, le=16)] = 4


class SetServing(Body):
    """All serving options. An option that is left out takes its default."""

    engine: EngineOption = "transformers"
    weights: WeightsName = "auto"
    draft: SetDraft | None = None


class DraftObject(BaseModel):
    """Draft model, and the number of tokens that it proposes at a time."""

    model: str
    num_tokens: int


class Serving(BaseModel):
    """Serving options of a model."""

    engine: EngineOption
    weights: WeightsName
    draft: DraftObject | None

    @classmethod
    def of(cls, options: ServingOptions) -> "Serving":
        draft = options.draft
        shown = DraftObject(model=draft.model, num_tokens=draft.num_tokens) if draft else None
        return cls(engine=options.engine, weights=options.weights, draft=shown)


class ServingObject(Serving):
    """Serving options of a model, as a response."""

    object: Literal["model.serving"] = "model.serving"
    model: str


LoadState = Literal["absent", "loading", "resident", "failed"]


class WorkerState(BaseModel):
    """State of a model on one serve worker.

    weights: The format in which the weights were loaded.
    first_token_ms: Time to the first token of a short prompt, measured alone after the load.
    acceptance_rate: Share of the draft's tokens that were accepted since the load; null without a
        draft.
    """

    worker: str
    state: LoadState
    bytes: int | None = None
    percent: float = 0.0
    weights: LoadedWeights | None = None
    load_seconds: float | None = None
    first_token_ms: float | None = None
    acceptance_rate: float | None = None
    error: str | None = None


class ModelStatus(BaseModel):
    """State of a model on all serve workers. `state` is the best state of any worker."""

    object: Literal["model.status"] = "model.status"
    model: str
    state: LoadState
    is_pinned: bool
    workers: list[WorkerState]
