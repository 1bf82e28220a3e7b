"""Queries and changes of registered models, their aliases, pins and checkpoints."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    String,
    bindparam,
    delete,
    exists,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.conditions import HAS_NOT_ENDED
from app.db.registry.batch_models import batches_using
from app.db.schema.table import Json
from app.db.schema.tables import Alias, Batch, Checkpoint, Job, Model, Pin
from app.db.session import read_row


def insert_model(
    session: Session, **columns: Any
) -> Model | None:  # Any: the columns of Model, by name
    """Inserts a model and returns its row, or None if the id is taken."""
    fresh = (
        insert(Model)
        .values(**columns)
        .on_conflict_do_nothing(index_elements=[Model.id])
        .returning(Model)
    )
    return session.scalars(fresh).one_or_none()


def find_model(
    session: Session, project_id: str, model_id: str, *, lock: bool = False
) -> Model | None:
    """Returns a model that the project can use: its own or a shared one.

    With `lock`, the model cannot be deleted until the transaction ends.
    """
    query = select(Model).where(Model.id == model_id, _sees(project_id))
    if lock:
        query = query.with_for_update(read=True, key_share=True)
    return session.scalars(query).one_or_none()


@dataclass(frozen=True)
class ServedRow:
    """Columns of a model that serving needs."""

    id: str
    store_key: str
    bytes: int
    manifest_sha256: str
    facts: Json
    serving: Json | None


def read_served(project_id: str, asked: str) -> ServedRow | None:
    """Returns the committed model with this id or alias, or None if the project has no access.

    Raises DatabaseUnavailable.
    """
    row = read_row(_served(), project_id=project_id, asked=asked)
    return None if row is None else ServedRow(*row)


@lru_cache
def _served() -> Select[Any]:  # Any: the columns of ServedRow
    project_id, asked = bindparam("project_id", type_=String), bindparam("asked", type_=String)
    meant = (
        select(Alias.model_id)
        .where(Alias.project_id == project_id, Alias.id == asked)
        .scalar_subquery()
    )
    columns = (getattr(Model, field.name) for field in fields(ServedRow))
    return select(*columns).where(Model.id == func.coalesce(meant, asked), _sees(project_id))


def is_name_taken(session: Session, name: str) -> bool:
    """Returns whether a model of any project has this id, or an unfinished job will register it.

    A data set has its name in the same column, but registers no model.
    """
    model = session.scalar(select(Model.id).where(Model.id == name))
    will_register = (Job.model_id == name, HAS_NOT_ENDED, Job.kind != "dataset")
    job = session.scalar(select(Job.id).where(*will_register).limit(1))
    return model is not None or job is not None


def list_models(session: Session, project_id: str | None) -> list[Model]:
    """Returns the models that the project can use, or all models if it is None, newest first."""
    query = select(Model).order_by(Model.created_at.desc(), Model.id)
    if project_id is not None:
        query = query.where(_sees(project_id))
    return list(session.scalars(query))


@dataclass(frozen=True)
class ServingName:
    """Columns of a model that its serving key depends on, and its id."""

    id: str
    store_key: str
    serving: Json | None


def list_serving_names(
    session: Session, project_id: str | None, store_keys: Collection[str]
) -> list[ServingName]:
    """Returns the models with these folders, without those that the project cannot use.

    If `project_id` is None, it returns models of all projects.
    """
    if not store_keys:
        return []
    query = select(Model.id, Model.store_key, Model.serving).where(Model.store_key.in_(store_keys))
    if project_id is not None:
        query = query.where(_sees(project_id))
    return [ServingName(*row) for row in session.execute(query)]


def delete_model(session: Session, project_id: str | None, model_id: str) -> bool:
    """Deletes the row of the project's own model, and returns whether it existed.

    If `project_id` is None, it deletes a model that all projects share.

    The caller deletes the model's bytes after the transaction. The checkpoints are only marked; the
    garbage collector deletes them.
    """
    owned = Model.project_id.is_(None) if project_id is None else Model.project_id == project_id
    gone = delete(Model).where(Model.id == model_id, owned)
    job_id = session.execute(gone.returning(Model.id, Model.source_job_id)).one_or_none()
    if job_id is None:
        return False
    doomed = update(Checkpoint).where(Checkpoint.job_id == job_id.source_job_id)
    session.execute(doomed.values(status="deleting"))
    return True


def users_of_model(session: Session, model: Model) -> list[str]:
    """Returns the ids of everything that needs the model, as text for an error message.

    These are aliases, pins, models that use it as their draft, and jobs and batches that have not
    ended. A job needs the model if it reads the model or one of its checkpoints. The checkpoints of
    a LoRA job need its start model, which has the weights, also after the job has ended.
    """
    aliases = select(Alias.id).where(Alias.model_id == model.id)
    is_pinned = session.scalar(select(Pin.id).where(Pin.id == model.id).limit(1)) is not None
    keys = [Job.spec[side]["key"].astext for side in ("teacher", "start")]
    read = [key == model.store_key for key in keys]
    read += [key.startswith(f"checkpoints/{model.source_job_id}/") for key in keys]
    jobs = select(Job.id).where(HAS_NOT_ENDED, or_(*read))
    start_key = Job.spec["start"]["key"].astext
    merged = select(Job.id).where(
        or_(
            start_key == model.store_key,
            start_key.startswith(f"checkpoints/{model.source_job_id}/"),
        ),
        Job.spec["distillation"]["student"]["init"].astext == "lora",
        exists().where(Checkpoint.job_id == Job.id, Checkpoint.status == "committed"),
        ~HAS_NOT_ENDED,
    )
    drafted = select(Model.id).where(Model.serving["draft"]["model"].astext == model.id)
    return [
        *session.scalars(aliases.order_by(Alias.project_id, Alias.id)),
        *(["a pin"] if is_pinned else []),
        *(f"{id_} (as its draft)" for id_ in session.scalars(drafted.order_by(Model.id))),
        *session.scalars(jobs.order_by(Job.id)),
        *(f"{id_} (for its checkpoints)" for id_ in session.scalars(merged.order_by(Job.id))),
        *session.scalars(batches_using(model.id, None).order_by(Batch.id)),
    ]


def lock_artifact(session: Session, store_key: str) -> bool:
    """Prevents the deletion of a model until the transaction ends.

    store_key: Key of the model, or of a checkpoint of the job that registered the model.

    Returns False if the model does not exist, or the checkpoint cannot be used any more.
    """
    is_checkpoint = store_key.startswith("checkpoints/")
    owner = (
        Model.source_job_id == store_key.split("/")[1]
        if is_checkpoint
        else Model.store_key == store_key
    )
    model = select(Model.id).where(owner).with_for_update(read=True, key_share=True)
    if session.scalar(model) is None:
        return False
    if not is_checkpoint:
        return True
    checkpoint = select(Checkpoint.id).where(
        Checkpoint.store_key == store_key.removesuffix("/model"), Checkpoint.status == "committed"
    )
    return session.scalar(checkpoint) is not None


def model_of_job(session: Session, job_id: str) -> str | None:
    """Returns the id of the model that the job has registered, or None."""
    return session.scalar(select(Model.id).where(Model.source_job_id == job_id))


def lock_model(session: Session, model_id: str) -> Model | None:
    """Returns the model and locks its row exclusively until the transaction ends."""
    return session.scalars(
        select(Model).where(Model.id == model_id).with_for_update()
    ).one_or_none()


def pin(session: Session, project_id: str, target_id: str) -> None:
    """Pins a model id or an alias for the project. Pinning it again changes nothing."""
    session.execute(
        insert(Pin).values(project_id=project_id, id=target_id).on_conflict_do_nothing()
    )


def unpin(session: Session, project_id: str, target_id: str) -> bool:
    """Removes a pin, and returns whether there was one."""
    gone = delete(Pin).where(Pin.project_id == project_id, Pin.id == target_id)
    return session.scalar(gone.returning(Pin.id)) is not None


def list_pins(session: Session) -> list[Pin]:
    """Returns the pins of all projects, oldest first."""
    return list(session.scalars(select(Pin).order_by(Pin.created_at, Pin.project_id, Pin.id)))


def find_checkpoint(
    session: Session, project_id: str, model_id: str, step: int
) -> Checkpoint | None:
    """Returns the committed checkpoint `{model_id}:ckpt-step-{step}`, or None.

    The job may still be running. If several attempts wrote this step, the newest one counts.
    """
    query = (
        select(Checkpoint)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Job.project_id == project_id, Job.model_id == model_id)
        .where(Checkpoint.step == step, Checkpoint.status == "committed")
        .order_by(Checkpoint.lease_token.desc())
    )
    return session.scalars(query.limit(1)).one_or_none()


def start_bytes_of_adapters(session: Session, checkpoint: Checkpoint) -> int:
    """Returns the size of the start model of a LoRA job's checkpoint, which has no weights, else 0.

    Checkpoints of older versions have weights, and are larger than that.
    """
    spec = session.scalar(select(Job.spec).where(Job.id == checkpoint.job_id)) or {}
    is_lora = spec.get("distillation", {}).get("student", {}).get("init") == "lora"
    return int(spec["start"]["bytes"]) if is_lora else 0


def find_alias(session: Session, project_id: str, alias_id: str) -> Alias | None:
    """Returns the project's alias, or None."""
    return session.get(Alias, (project_id, alias_id))


def aliases_of_models(session: Session, project_id: str) -> dict[str, list[str]]:
    """Returns the project's aliases, grouped by the id of the model that they point at."""
    found: dict[str, list[str]] = {}
    for alias in session.scalars(
        select(Alias).where(Alias.project_id == project_id).order_by(Alias.id)
    ):
        found.setdefault(alias.model_id, []).append(alias.id)
    return found


def _sees(project_id: str | ColumnElement[str]) -> ColumnElement[bool]:
    return or_(Model.project_id == project_id, Model.project_id.is_(None))
