"""Request and response bodies of /v1/models."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, StringConstraints

from app.contracts.generation import ServingOptions
from app.contracts.messages import ModelFacts, ModelKind
from app.db.schema.tables import Checkpoint, Model
from app.schemas.jobs import Body
from app.schemas.serving import Serving
from app.settings import get_settings

Json = dict[str, Any]  # Any: an evaluation is open-ended JSON


class ModelObject(BaseModel):
    """Model in the format of OpenAI, with its origin, its properties and its evaluation."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    origin: str
    base_model: str | None
    teacher: str | None
    job_id: str | None
    aliases: list[str]
    architecture: str
    family: ModelKind
    num_parameters: int
    num_layers: int
    context_length: int
    vocab_size: int
    tokenizer_sha256: str
    weights_sha256: str
    size_bytes: int
    has_chat_template: bool
    serving: Serving
    evaluation: Json | None

    @classmethod
    def of(cls, row: Model, aliases: list[str]) -> "ModelObject":
        facts = ModelFacts.model_validate(row.facts)
        return cls(
            id=row.id,
            created=int(row.created_at.timestamp()),
            owned_by=row.project_id or "stillhouse",
            origin=row.origin,
            base_model=row.base_id,
            teacher=row.teacher_id,
            job_id=row.source_job_id,
            aliases=aliases,
            architecture=facts.architecture,
            family=facts.family,
            num_parameters=facts.num_parameters,
            num_layers=facts.num_layers,
            context_length=usable_context(facts),
            vocab_size=facts.vocab_size,
            tokenizer_sha256=facts.tokenizer_sha256,
            weights_sha256=facts.weights_sha256,
            size_bytes=row.bytes,
            has_chat_template=facts.has_chat_template,
            serving=Serving.of(ServingOptions.model_validate(row.serving or {})),
            evaluation=row.evaluation,
        )


class CheckpointModel(BaseModel):
    """Model that is a checkpoint of a job. It can be used as long as the job keeps it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    origin: Literal["checkpoint"] = "checkpoint"
    base_model: str
    job_id: str
    size_bytes: int

    @classmethod
    def of(cls, row: Checkpoint, *, model_id: str, project_id: str) -> "CheckpointModel":
        return cls(
            id=f"{model_id}:ckpt-step-{row.step}",
            created=int(row.created_at.timestamp()),
            owned_by=project_id,
            base_model=model_id,
            job_id=row.job_id,
            size_bytes=row.bytes,
        )


def usable_context(facts: ModelFacts) -> int:
    """Returns the number of tokens of prompt and answer that a request may have."""
    return min(facts.context_tokens, get_settings().max_context_tokens)


class ModelList(BaseModel):
    """List of all models, without pages, because the openai client does not page through models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ModelFile(BaseModel):
    """One file of a model. `sha256` is also the ETag of the download."""

    object: Literal["model.file"] = "model.file"
    name: str
    bytes: int
    sha256: str


class ImportModel(Body):
    """Body of a request that imports a model.

    `source` is hf:org/name or hf:org/name@revision. To import a folder on the server, use the
    command line.
    """

    source: Annotated[
        str,
        StringConstraints(
            max_length=200,
            pattern=r"^hf:[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._/-]*)?$",
        ),
    ]
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
