"""Control messages to serve workers. Requests do not use this channel but the worker's queue."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from app.contracts.messages import ArtifactRef, Cancel, Contract, ServingOptions, residence_of


class ServedModel(Contract):
    """A model version with its serving options, as a serve worker loads it."""

    model: str
    weights: ArtifactRef
    serving: ServingOptions = ServingOptions()

    @property
    def residence(self) -> str:
        """Serving key under which a worker keeps the model loaded."""
        return residence_of(self.weights, self.serving)

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
    residence: str


class Keep(Contract):
    """Message that lists all pinned models, and replaces the previous list.

    A worker loads pinned models and never evicts them for other models.
    """

    kind: Literal["keep"] = "keep"
    models: tuple[ServedModel, ...]


Control = Annotated[Cancel | Load | Unload | Keep, Field(discriminator="kind")]
CONTROL: TypeAdapter[Cancel | Load | Unload | Keep] = TypeAdapter(Control)
