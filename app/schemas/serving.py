"""HTTP bodies of /v1/models/{id}/serving, /status, /load, /unload, /pin and /unpin."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.contracts.messages import EngineName, LoadedWeights, ServingOptions, WeightsName
from app.schemas.jobs import Body, ModelId


class SetDraft(Body):
    model: ModelId
    num_tokens: Annotated[int, Field(ge=1, le=16)] = 4


class SetServing(Body):
    """All options at once; what is left out takes its default."""

    engine: EngineName = "transformers"
    weights: WeightsName = "auto"
    draft: SetDraft | None = None


class DraftObject(BaseModel):
    model: str
    num_tokens: int


class Serving(BaseModel):
    """How a model is served."""

    engine: EngineName
    weights: WeightsName
    draft: DraftObject | None

    @classmethod
    def of(cls, options: ServingOptions) -> "Serving":
        draft = options.draft
        shown = DraftObject(model=draft.model, num_tokens=draft.num_tokens) if draft else None
        return cls(engine=options.engine, weights=options.weights, draft=shown)


class ServingObject(Serving):
    object: Literal["model.serving"] = "model.serving"
    model: str


LoadState = Literal["absent", "loading", "resident", "failed"]


class WorkerState(BaseModel):
    """What one serve worker has of the model.

    weights: what they were loaded as. first_token_ms: of a short prompt, alone, measured after the load. acceptance_rate: the
    share of the draft's tokens that the model took since the load; null without a draft.
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
    """`state` is the best of any worker."""

    object: Literal["model.status"] = "model.status"
    model: str
    state: LoadState
    is_pinned: bool
    workers: list[WorkerState]
