"""Idempotency keys: the first request with a key does the work, and later ones get its response.

The caller claims the key, does the work and stores the response in one transaction. Then a crash
leaves no trace, and a concurrent request with the same key waits for the outcome.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from psycopg.errors import LockNotAvailable
from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.db.schema.retry_tables import IdempotencyKey
from app.db.schema.table import Json

LIFETIME: Final = timedelta(hours=24)


@dataclass(frozen=True)
class Claimed:
    """An earlier request with the same key. `response` is None while it is being processed."""

    request_sha256: str
    response: Json | None


def find_key(session: Session, project_id: str, route: str, key: str) -> Claimed | None:
    """Returns the committed request with this key, or None if there is none or it has expired."""
    row = session.get(IdempotencyKey, (project_id, key, route))
    is_alive = row is not None and row.expires_at > session.scalars(select(func.now())).one()
    return Claimed(row.request_sha256, row.response) if row is not None and is_alive else None


def claim_key(
    session: Session, project_id: str, route: str, key: str, request_sha256: str
) -> Claimed | None:
    """Claims the key for this transaction, or returns the request that claimed it before.

    Returns None if the key is now claimed by this transaction. If another open transaction holds
    the key, waits for it to end. After the connection's `lock_timeout`, returns a request without
    a response.
    """
    place = (
        IdempotencyKey.project_id == project_id,
        IdempotencyKey.key == key,
        IdempotencyKey.route == route,
    )
    claim = insert(IdempotencyKey).values(
        project_id=project_id,
        key=key,
        route=route,
        request_sha256=request_sha256,
        expires_at=func.now() + LIFETIME,
    )
    taken = claim.on_conflict_do_nothing().returning(IdempotencyKey.key)
    try:
        with session.begin_nested():
            session.execute(
                delete(IdempotencyKey).where(*place, IdempotencyKey.expires_at <= func.now())
            )
            if session.scalar(taken) is not None:
                return None
    except OperationalError as error:
        if not isinstance(error.orig, LockNotAvailable):
            raise
        return Claimed(request_sha256, None)
    row = session.scalars(select(IdempotencyKey).where(*place)).one_or_none()
    return Claimed(row.request_sha256, row.response) if row else Claimed(request_sha256, None)


def store_response(session: Session, project_id: str, route: str, key: str, response: Json) -> None:
    """Stores the response that later requests with this key get."""
    place = (
        IdempotencyKey.project_id == project_id,
        IdempotencyKey.key == key,
        IdempotencyKey.route == route,
    )
    session.execute(update(IdempotencyKey).where(*place).values(response=response))
