"""Queries and changes of aliases, with their history.

A change of an alias and its entry in the history are written in one transaction.
"""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.models import unpin
from app.db.pagination import Order, keyset_page
from app.db.schema.ids import new_id
from app.db.schema.registry_tables import AliasChange
from app.db.schema.tables import Alias


def lock_alias(session: Session, project_id: str, alias_id: str) -> Alias | None:
    """Returns the alias, if it exists. Until the transaction ends, only this one can change it."""
    name = f"alias {project_id} {alias_id}"
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
    return session.get(Alias, (project_id, alias_id), populate_existing=True)


def point_alias(
    session: Session, project_id: str, alias_id: str, *, model_id: str, key_id: str
) -> Alias:
    """Creates the alias or moves it to the model. The caller has called `lock_alias`.

    The history gets an entry unless the alias already points at the model.
    """
    alias = session.get(Alias, (project_id, alias_id))
    if alias is not None and alias.model_id == model_id:
        return alias
    before = alias.model_id if alias is not None else None
    if alias is None:
        alias = Alias(project_id=project_id, id=alias_id, model_id=model_id)
        session.add(alias)
    alias.model_id = model_id
    alias.updated_at = func.now()
    _record(session, alias, from_model=before, to_model=model_id, key_id=key_id)
    session.flush()
    session.refresh(alias)
    return alias


def drop_alias(session: Session, alias: Alias, *, key_id: str) -> None:
    """Deletes an alias and its pin. The caller has called `lock_alias`."""
    _record(session, alias, from_model=alias.model_id, to_model=None, key_id=key_id)
    unpin(session, alias.project_id, alias.id)
    session.delete(alias)
    session.flush()


def share_alias(session: Session, project_id: str, alias_id: str) -> bool:
    """Prevents the deletion of an alias until the transaction ends. Returns whether it exists."""
    query = select(Alias.id).where(Alias.project_id == project_id, Alias.id == alias_id)
    return session.scalar(query.with_for_update(read=True, key_share=True)) is not None


def newest_change(session: Session, project_id: str, alias_id: str) -> AliasChange | None:
    """Returns the newest entry in the history of the alias, or None."""
    query = select(AliasChange).where(
        AliasChange.project_id == project_id, AliasChange.alias_id == alias_id
    )
    query = query.order_by(AliasChange.created_at.desc(), AliasChange.id.desc())
    return session.scalars(query.limit(1)).one_or_none()


def page_changes(
    session: Session, project_id: str, alias_id: str, *, after: str | None, limit: int, order: Order
) -> tuple[list[AliasChange], bool]:
    """Returns a page of the history, and whether more follow. Raises UnknownCursor."""
    query = select(AliasChange).where(
        AliasChange.project_id == project_id, AliasChange.alias_id == alias_id
    )
    return keyset_page(session, query, AliasChange, after=after, limit=limit, order=order)


def _record(
    session: Session, alias: Alias, *, from_model: str | None, to_model: str | None, key_id: str
) -> None:
    session.add(
        AliasChange(
            id=new_id("aliasevt-"),
            project_id=alias.project_id,
            alias_id=alias.id,
            from_model=from_model,
            to_model=to_model,
            key_id=key_id,
            # Not now(), which is the start of the transaction: entries are ordered by this time,
            # and the transaction may have waited for the lock of another one.
            created_at=func.clock_timestamp(),
        )
    )
