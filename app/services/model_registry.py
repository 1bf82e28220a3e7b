"""Model registry: resolves model ids to stored weights, and manages models and their aliases."""

import re
from dataclasses import dataclass, field

from app.contracts.control import ServedModel
from app.contracts.generation import ServingOptions
from app.contracts.messages import ArtifactRef, ModelFacts
from app.db import models
from app.db.schema.tables import Checkpoint, Model
from app.db.session import Session, transaction
from app.errors import BadRequest, NotFound

CHECKPOINT_PATTERN = re.compile(r"(?P<model>.+):ckpt-step-(?P<step>\d{1,12})")


@dataclass(frozen=True)
class Resolved:
    """A model id with the folder that it names: config, weights and tokenizer in the store.

    `facts` is None for a checkpoint of a job that has not registered its model.
    """

    model_id: str
    ref: ArtifactRef
    facts: ModelFacts | None
    serving: ServingOptions = field(default_factory=ServingOptions)

    @property
    def served(self) -> ServedModel:
        return ServedModel(model=self.model_id, weights=self.ref, serving=self.serving)


def resolve_at_once(project_id: str, model_id: str) -> Resolved:
    """Like `resolve`, with a single database round trip if the id is a model or an alias.

    Used for generation requests. Raises NotFound.
    """
    row = models.read_served(project_id, model_id.replace("\x00", "\ufffd"))
    if row is None:  # a checkpoint, or an unknown id
        with transaction() as session:
            return resolve(session, project_id, model_id)
    ref = ArtifactRef(key=row.store_key, bytes=row.bytes, sha256=row.manifest_sha256)
    facts = ModelFacts.model_validate(row.facts)
    return Resolved(row.id, ref, facts, ServingOptions.model_validate(row.serving or {}))


def resolve_or_only(project_id: str, model_id: str | None) -> Resolved:
    """Returns what a model id refers to. Without an id, returns the only model of the project.

    Raises NotFound, and BadRequest if the project has several models and `model_id` is None.
    """
    if model_id is not None:
        return resolve_at_once(project_id, model_id)
    with transaction() as session:
        rows = models.list_models(session, project_id)
        if len(rows) != 1:
            message = f"the project has {len(rows)} models; name one in `model`"
            raise BadRequest(message, "missing_required_parameter", "model")
        return resolve(session, project_id, rows[0].id)


def resolve(
    session: Session, project_id: str, model_id: str, *, param: str = "model", lock: bool = False
) -> Resolved:
    """Returns the folder of a model id, an alias `name@alias` or a checkpoint `…:ckpt-step-n`.

    With `lock`, the model cannot be deleted until the transaction ends. Raises NotFound.
    """
    # Postgres text cannot contain NUL, so no model has such an id.
    model_id = model_id.replace("\x00", "\ufffd")
    match = CHECKPOINT_PATTERN.fullmatch(model_id)
    if match:
        # Lock the model first. If that waits for its deletion, the next query sees the checkpoints
        # deleted, too.
        registered = models.find_model(session, project_id, match["model"], lock=lock)
        found = models.find_checkpoint(session, project_id, match["model"], int(match["step"]))
        if found is not None:
            facts = ModelFacts.model_validate(registered.facts) if registered else None
            num_bytes = max(found.bytes, models.start_bytes_of_adapters(session, found))
            ref = ArtifactRef(key=f"{found.store_key}/model", bytes=num_bytes)
            return Resolved(model_id, ref, facts)
    row = get_model(session, project_id, model_id, param=param, lock=lock)
    return Resolved(row.id, artifact(row), ModelFacts.model_validate(row.facts), options_of(row))


def find_checkpoint(
    session: Session, project_id: str, model_id: str
) -> tuple[str, Checkpoint] | None:
    """Returns the model id and the checkpoint that an id `…:ckpt-step-n` names, or None."""
    match = CHECKPOINT_PATTERN.fullmatch(model_id.replace("\x00", "\ufffd"))
    if match is None:
        return None
    row = models.find_checkpoint(session, project_id, match["model"], int(match["step"]))
    return None if row is None else (match["model"], row)


def options_of(row: Model) -> ServingOptions:
    """Returns the serving options of a model; the defaults if none are set."""
    return ServingOptions.model_validate(row.serving or {})


def artifact(row: Model) -> ArtifactRef:
    """Returns the reference to a model's folder in the store."""
    return ArtifactRef(key=row.store_key, bytes=row.bytes, sha256=row.manifest_sha256)


def get_model(
    session: Session, project_id: str, model_id: str, *, param: str = "model", lock: bool = False
) -> Model:
    """Returns the model with this id, or the one that an alias points at. Raises NotFound."""
    alias = models.find_alias(session, project_id, model_id) if "@" in model_id else None
    row = models.find_model(session, project_id, alias.model_id if alias else model_id, lock=lock)
    if row is None:
        message = f"the model {model_id!r} does not exist; GET /v1/models lists those you may use"
        raise NotFound(message, "model_not_found", param)
    return row
