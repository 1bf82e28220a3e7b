"""Queries and changes of API keys."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session

from app.db.schema.tables import ApiKey
from app.db.schema.usage_tables import ProjectLimits
from app.db.session import read_row
from app.db.usage.limits import KEY_COLUMNS, PROJECT_COLUMNS, UNLIMITED, Limits


def insert_key(
    session: Session,
    *,
    id: str,  # noqa: A002  # the column's name
    project_id: str,
    secret_hmac: bytes,
    scopes: Sequence[str],
    expires_at: datetime | None = None,
    limits: Limits = UNLIMITED,
) -> ApiKey:
    """Inserts an API key, of whose secret only the HMAC is stored."""
    row = ApiKey(
        id=id,
        project_id=project_id,
        secret_hmac=secret_hmac,
        scopes=list(scopes),
        expires_at=expires_at,
        **asdict(limits),
    )
    session.add(row)
    session.flush()
    return row


@dataclass(frozen=True)
class KeyFacts:
    """Columns of an API key that authentication needs, with the limits of the key's project."""

    project_id: str
    secret_hmac: bytes
    scopes: Sequence[str]
    expires_at: datetime | None
    revoked_at: datetime | None
    limits: Limits = UNLIMITED
    project_limits: Limits = UNLIMITED


_COLUMNS = (
    ApiKey.project_id,
    ApiKey.secret_hmac,
    ApiKey.scopes,
    ApiKey.expires_at,
    ApiKey.revoked_at,
)
# One query, because it delays the first token of every answer.
_FACTS = (
    select(*_COLUMNS, *KEY_COLUMNS, *PROJECT_COLUMNS)
    .outerjoin(ProjectLimits, ProjectLimits.project_id == ApiKey.project_id)
    .where(ApiKey.id == bindparam("key_id"))
)


def read_key(key_id: str) -> KeyFacts | None:
    """Returns the committed key with this id, or None.

    Expired and revoked keys are returned, too. Raises DatabaseUnavailable.
    """
    row = read_row(_FACTS, key_id=key_id)
    if row is None:
        return None
    project_id, secret_hmac, scopes, expires_at, revoked_at, *limits = row
    return KeyFacts(
        project_id,
        secret_hmac,
        scopes,
        expires_at,
        revoked_at,
        Limits(*limits[: len(KEY_COLUMNS)]),
        Limits(*limits[len(KEY_COLUMNS) :]),
    )


def list_keys(session: Session, project_id: str | None = None) -> list[ApiKey]:
    """Returns the keys of a project, or of all projects, oldest first."""
    query = select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)
    return list(
        session.scalars(query.where(ApiKey.project_id == project_id) if project_id else query)
    )


def revoke_key(session: Session, key_id: str) -> bool:
    """Revokes a key immediately. Returns False if there is no such key.

    Revoking a key again keeps the time of the first revocation.
    """
    revoked = update(ApiKey).where(ApiKey.id == key_id)
    revoked = revoked.values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
    return session.execute(revoked.returning(ApiKey.id)).one_or_none() is not None
