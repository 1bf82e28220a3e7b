"""API keys."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session

from app.db.schema.tables import ApiKey
from app.db.session import read_row


def insert_key(
    session: Session,
    *,
    id: str,  # noqa: A002  # the column's name
    project_id: str,
    secret_hmac: bytes,
    scopes: Sequence[str],
    expires_at: datetime | None = None,
) -> ApiKey:
    row = ApiKey(
        id=id,
        project_id=project_id,
        secret_hmac=secret_hmac,
        scopes=list(scopes),
        expires_at=expires_at,
    )
    session.add(row)
    session.flush()
    return row


@dataclass(frozen=True)
class KeyFacts:
    """What a key opens, and whether it still does."""

    project_id: str
    secret_hmac: bytes
    scopes: Sequence[str]
    expires_at: datetime | None
    revoked_at: datetime | None


_FACTS = select(*(getattr(ApiKey, field.name) for field in fields(KeyFacts))).where(
    ApiKey.id == bindparam("key_id")
)


def read_key(key_id: str) -> KeyFacts | None:
    """The committed key with this id, whether or not it may still be used."""
    row = read_row(_FACTS, key_id=key_id)
    return None if row is None else KeyFacts(*row)


def list_keys(session: Session, project_id: str | None = None) -> list[ApiKey]:
    query = select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)
    return list(
        session.scalars(query.where(ApiKey.project_id == project_id) if project_id else query)
    )


def revoke_key(session: Session, key_id: str) -> bool:
    """Ends a key at once; False if there is none. Revoking twice keeps the first time."""
    revoked = update(ApiKey).where(ApiKey.id == key_id)
    revoked = revoked.values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
    return session.execute(revoked.returning(ApiKey.id)).one_or_none() is not None
