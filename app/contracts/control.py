"""What a serve worker hears on its control channel, beside its queue of requests."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from app.contracts.messages import ArtifactRef, Cancel, Contract, ServingOptions, residence_of


class ServedModel(Contract):
    """A model and how it is served: what a serve worker loads."""

    model: str
    weights: ArtifactRef
    serving: ServingOptions = ServingOptions()

    @property
    def residence(self) -> str:
        return residence_of(self.weights, self.serving)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all folders that are read to load it."""
        draft = self.serving.draft
        return self.weights.bytes + (draft.weights.bytes if draft else 0)


class Load(Contract):
    """Loads a model before anyone asks it; nothing happens if it is there."""

    kind: Literal["load"] = "load"
    served: ServedModel


class Unload(Contract):
    """Gives a model's memory back as soon as what it writes now is written."""

    kind: Literal["unload"] = "unload"
    residence: str


class Keep(Contract):
    """All models that are pinned: they are loaded, and never make room for others. Replaces what was said before."""

    kind: Literal["keep"] = "keep"
    models: tuple[ServedModel, ...]


Control = Annotated[Cancel | Load | Unload | Keep, Field(discriminator="kind")]
CONTROL: TypeAdapter[Cancel | Load | Unload | Keep] = TypeAdapter(Control)
