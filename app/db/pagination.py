"""Keyset pagination over (created_at, id), which stays stable while rows are added or deleted."""

from typing import Literal, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

from app.db.schema.registry_tables import AliasChange
from app.db.schema.tables import Batch, Checkpoint, File, Job
from app.db.schema.webhook_tables import WebhookDelivery, WebhookEndpoint

Order = Literal["asc", "desc"]
Row = TypeVar("Row", File, Job, Checkpoint, Batch, AliasChange, WebhookEndpoint, WebhookDelivery)


class UnknownCursor(LookupError):
    """The cursor `after` is not the id of a row in the list."""


def keyset_page(
    session: Session,
    rows: Select[Row],
    table: type[Row],
    *,
    after: str | None,
    limit: int,
    order: Order,
) -> tuple[list[Row], bool]:
    """Returns up to `limit` rows after the one with the id `after`, and whether more follow.

    Raises UnknownCursor if `rows` does not contain the row `after`.
    """
    place = tuple_(table.created_at, table.id)
    if after is not None:
        cursor = session.scalars(rows.where(table.id == after)).one_or_none()
        if cursor is None:
            raise UnknownCursor(after)
        behind = (cursor.created_at, cursor.id)
        rows = rows.where(place > behind if order == "asc" else place < behind)
    columns = (table.created_at, table.id)
    rows = rows.order_by(*(columns if order == "asc" else (column.desc() for column in columns)))
    found = list(session.scalars(rows.limit(limit + 1)))
    return found[:limit], len(found) > limit
