"""Request and response bodies of aliases of models."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.db.schema.registry_tables import AliasChange
from app.db.schema.tables import Alias
from app.schemas.jobs import Body, ModelId

Expected = Annotated[ModelId | None, Field(alias="from")]


class SetAlias(Body):
    """Body of a request that points an alias at a model.

    `from` is the model that the alias must point at before.
    """

    model: ModelId
    expected: Expected = None


class RollBack(Body):
    """Body of a request that rolls an alias back. `from` is as in SetAlias."""

    expected: Expected = None


class AliasObject(BaseModel):
    """Alias of a model."""

    id: str
    object: Literal["model.alias"] = "model.alias"
    model: str
    updated_at: int

    @classmethod
    def of(cls, row: Alias) -> "AliasObject":
        return cls(id=row.id, model=row.model_id, updated_at=int(row.updated_at.timestamp()))


class AliasChangeObject(BaseModel):
    """Change of an alias: when it was made, by which API key, and the models before and after.

    `from` is null if the alias was created, and `to` if it was deleted.
    """

    id: str
    object: Literal["model.alias.change"] = "model.alias.change"
    alias: str
    created_at: int
    key_id: str
    before: str | None = Field(serialization_alias="from")
    after: str | None = Field(serialization_alias="to")

    @classmethod
    def of(cls, row: AliasChange) -> "AliasChangeObject":
        return cls(
            id=row.id,
            alias=row.alias_id,
            created_at=int(row.created_at.timestamp()),
            key_id=row.key_id,
            before=row.from_model,
            after=row.to_model,
        )
