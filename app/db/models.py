"""Registered models, their aliases and their servable checkpoints."""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Select, String, bindparam, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.conditions import HAS_NOT_ENDED
from app.db.schema.table import Json
from app.db.schema.tables import Alias, Checkpoint, Job, Model, Pin
from app.db.session import read_row


def insert_model(
    session: Session, **columns: Any
) -> Model | None:  # Any: the columns of Model, by name
    """The new row, or None if the id is taken."""
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
    """The project's own model, or a shared one; `lock` keeps it until the transaction ends."""
    query = select(Model).where(Model.id == model_id, _sees(project_id))
    if lock:
        query = query.with_for_update(read=True, key_share=True)
    return session.scalars(query).one_or_none()


@dataclass(frozen=True)
class ServedRow:
    """What serving has to know of a model."""

    id: str
    store_key: str
    bytes: int
    manifest_sha256: str
    facts: Json
    serving: Json | None


def read_served(project_id: str, asked: str) -> ServedRow | None:
    """The committed model with this id or behind this alias, if the project sees it."""
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
    """Whether a model has this id, in any project, or a job that has not ended will register it."""
    model = session.scalar(select(Model.id).where(Model.id == name))
    job = session.scalar(select(Job.id).where(Job.model_id == name, HAS_NOT_ENDED).limit(1))
    return model is not None or job is not None


def list_models(session: Session, project_id: str) -> list[Model]:
    query = select(Model).where(_sees(project_id)).order_by(Model.created_at.desc(), Model.id)
    return list(session.scalars(query))


def delete_model(session: Session, project_id: str, model_id: str) -> bool:
    """Forgets the project's own model, its checkpoints and its pin; the bytes are the caller's to delete afterwards.

    The checkpoints' bytes go with the reconciler.
    """
    unpin(session, project_id, model_id)
    gone = delete(Model).where(Model.id == model_id, Model.project_id == project_id)
    job_id = session.execute(gone.returning(Model.id, Model.source_job_id)).one_or_none()
    if job_id is None:
        return False
    doomed = update(Checkpoint).where(Checkpoint.job_id == job_id.source_job_id)
    session.execute(doomed.values(status="deleting"))
    return True


def users_of_model(session: Session, project_id: str, model: Model) -> list[str]:
    """What needs the model: aliases, models that it is the draft of, and living jobs that read it or its checkpoints."""
    aliases = select(Alias.id).where(Alias.project_id == project_id, Alias.model_id == model.id)
    keys = [Job.spec[side]["key"].astext for side in ("teacher", "start")]
    read = [key == model.store_key for key in keys]
    read += [key.startswith(f"checkpoints/{model.source_job_id}/") for key in keys]
    jobs = select(Job.id).where(HAS_NOT_ENDED, or_(*read))
    drafted = select(Model.id).where(Model.serving["draft"]["model"].astext == model.id)
    return [
        *session.scalars(aliases.order_by(Alias.id)),
        *(f"{id_} (as its draft)" for id_ in session.scalars(drafted.order_by(Model.id))),
        *session.scalars(jobs.order_by(Job.id)),
    ]


def lock_artifact(session: Session, store_key: str) -> bool:
    """Keeps the model or checkpoint with these bytes until the transaction ends; False if it is gone."""
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
    """Id of the model that the job has registered, if it still exists."""
    return session.scalar(select(Model.id).where(Model.source_job_id == job_id))


def lock_model(session: Session, model_id: str) -> Model | None:
    """The row, which nobody else changes or removes before this transaction ends."""
    return session.scalars(
        select(Model).where(Model.id == model_id).with_for_update()
    ).one_or_none()


def pin(session: Session, project_id: str, target_id: str) -> None:
    """Keeps a model, or what an alias points at, loaded; once more changes nothing."""
    session.execute(
        insert(Pin).values(project_id=project_id, id=target_id).on_conflict_do_nothing()
    )


def unpin(session: Session, project_id: str, target_id: str) -> bool:
    gone = delete(Pin).where(Pin.project_id == project_id, Pin.id == target_id)
    return session.scalar(gone.returning(Pin.id)) is not None


def list_pins(session: Session) -> list[Pin]:
    """Those of all projects, oldest first."""
    return list(session.scalars(select(Pin).order_by(Pin.created_at, Pin.project_id, Pin.id)))


def find_checkpoint(
    session: Session, project_id: str, model_id: str, step: int
) -> Checkpoint | None:
    """The committed checkpoint `{model_id}:ckpt-step-{step}`, whether its job has ended or not."""
    query = (
        select(Checkpoint)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Job.project_id == project_id, Job.model_id == model_id)
        .where(Checkpoint.step == step, Checkpoint.status == "committed")
        .order_by(Checkpoint.lease_token.desc())
    )
    return session.scalars(query.limit(1)).one_or_none()


def set_alias(session: Session, project_id: str, alias_id: str, model_id: str) -> Alias:
    """Points `name@alias` at a version, wherever it pointed before."""
    values = {"model_id": model_id, "updated_at": func.now()}
    moved = insert(Alias).values(project_id=project_id, id=alias_id, **values)
    moved = moved.on_conflict_do_update(index_elements=[Alias.project_id, Alias.id], set_=values)
    return session.scalars(
        moved.returning(Alias), execution_options={"populate_existing": True}
    ).one()


def find_alias(session: Session, project_id: str, alias_id: str) -> Alias | None:
    return session.get(Alias, (project_id, alias_id))


def delete_alias(session: Session, project_id: str, alias_id: str) -> bool:
    unpin(session, project_id, alias_id)
    gone = delete(Alias).where(Alias.project_id == project_id, Alias.id == alias_id)
    return session.scalar(gone.returning(Alias.id)) is not None


def aliases_of_models(session: Session, project_id: str) -> dict[str, list[str]]:
    """The project's aliases by the model they point at."""
    found: dict[str, list[str]] = {}
    for alias in session.scalars(
        select(Alias).where(Alias.project_id == project_id).order_by(Alias.id)
    ):
        found.setdefault(alias.model_id, []).append(alias.id)
    return found


def _sees(project_id: str | ColumnElement[str]) -> ColumnElement[bool]:
    return or_(Model.project_id == project_id, Model.project_id.is_(None))
