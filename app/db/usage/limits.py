"""Reads and changes the limits of keys and projects."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Final

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.schema.tables import ApiKey
from app.db.schema.usage_tables import ProjectLimits


@dataclass(frozen=True)
class Limits:
    """Limits of a key or a project. None means unlimited.

    requests_per_minute, tokens_per_minute: Rate limits.
    daily_tokens, monthly_tokens: Budgets. A day and a month begin in UTC.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    daily_tokens: int | None = None
    monthly_tokens: int | None = None

    @property
    def has_budget(self) -> bool:
        return self.daily_tokens is not None or self.monthly_tokens is not None


UNLIMITED = Limits()
MAX_PER_MINUTE: Final = 50_000_000  # above it, the rate limiter would round
MAX_BUDGET: Final = 10**15
LIMIT_NAMES = tuple(field.name for field in fields(Limits))
KEY_COLUMNS = tuple(getattr(ApiKey, name) for name in LIMIT_NAMES)
PROJECT_COLUMNS = tuple(getattr(ProjectLimits, name) for name in LIMIT_NAMES)


def key_limits(session: Session, key_id: str) -> Limits | None:
    """Returns the limits of a key, or None if there is no such key."""
    row = session.execute(select(*KEY_COLUMNS).where(ApiKey.id == key_id)).one_or_none()
    return None if row is None else Limits(*row)


def project_limits(session: Session, project_id: str) -> Limits:
    """Returns the limits of a project."""
    query = select(*PROJECT_COLUMNS).where(ProjectLimits.project_id == project_id)
    row = session.execute(query).one_or_none()
    return UNLIMITED if row is None else Limits(*row)


def set_key_limits(
    session: Session, key_id: str, changes: Mapping[str, int | None]
) -> Limits | None:
    """Changes some limits of a key, by name. Returns all of them, or None for an unknown key."""
    if changes:
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(dict(changes)))
    return key_limits(session, key_id)


def set_project_limits(
    session: Session, project_id: str, changes: Mapping[str, int | None]
) -> Limits:
    """Changes some limits of a project, by name. Returns all of them."""
    if changes:
        row = insert(ProjectLimits).values(
            project_id=project_id, **(asdict(UNLIMITED) | dict(changes))
        )
        session.execute(row.on_conflict_do_update(index_elements=["project_id"], set_={**changes}))
    return project_limits(session, project_id)


def list_project_limits(session: Session) -> list[tuple[str, Limits]]:
    """Returns all projects that have limits, by name."""
    query = select(ProjectLimits.project_id, *PROJECT_COLUMNS).order_by(ProjectLimits.project_id)
    found = [(project_id, Limits(*columns)) for project_id, *columns in session.execute(query)]
    return [(project_id, limits) for project_id, limits in found if limits != UNLIMITED]
