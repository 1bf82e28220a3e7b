"""Models and aliases that batches use."""

from collections.abc import Collection

from sqlalchemy import Select, insert, select
from sqlalchemy.orm import Session

from app.db.schema.registry_tables import BatchModel
from app.db.schema.tables import ENDED_BATCHES, Batch


def insert_models(session: Session, batch_id: str, model_ids: Collection[str]) -> None:
    """Records that a new batch uses these models and aliases."""
    rows = [{"batch_id": batch_id, "model_id": model_id} for model_id in sorted(model_ids)]
    if rows:
        session.execute(insert(BatchModel), rows)


def batches_using(model_id: str, project_id: str | None) -> Select[str]:
    """Returns the query for the ids of unfinished batches that use a model or an alias.

    If `project_id` is None, it selects batches of all projects.
    """
    # Starts from the few unfinished batches, not from all that ever used the model.
    query = select(Batch.id).join(BatchModel, BatchModel.batch_id == Batch.id)
    query = query.where(Batch.status.not_in(ENDED_BATCHES), BatchModel.model_id == model_id)
    return query if project_id is None else query.where(Batch.project_id == project_id)


def users_of_alias(session: Session, project_id: str, alias_id: str) -> list[str]:
    """Returns the ids of the project's unfinished batches that use the alias."""
    return list(session.scalars(batches_using(alias_id, project_id).order_by(Batch.id)))
