"""Queries and changes of webhook endpoints."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from app.db.pagination import Order, keyset_page
from app.db.schema.webhook_tables import WebhookEndpoint


def insert_endpoint(
    session: Session, **columns: Any
) -> WebhookEndpoint:  # Any: the columns of WebhookEndpoint, by name
    """Inserts an enabled endpoint."""
    row = WebhookEndpoint(**columns)
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def count_endpoints(session: Session, project_id: str) -> int:
    """Returns the number of the project's endpoints, including disabled ones."""
    query = select(func.count()).select_from(WebhookEndpoint)
    return session.scalar(query.where(WebhookEndpoint.project_id == project_id)) or 0


def find_endpoint(
    session: Session, project_id: str, endpoint_id: str, *, lock: bool = False
) -> WebhookEndpoint | None:
    """Returns the project's endpoint with this id, or None.

    lock: Prevents changes by other transactions until this one ends.
    """
    query = select(WebhookEndpoint).where(
        WebhookEndpoint.id == endpoint_id, WebhookEndpoint.project_id == project_id
    )
    if lock:
        query = query.with_for_update(key_share=True)
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def find_recent(
    session: Session,
    project_id: str,
    *,
    seconds: float,
    name: str,
    url: str,
    event_types: Sequence[str],
) -> WebhookEndpoint | None:
    """Returns the newest equal endpoint that was created in the last `seconds`, or None."""
    query = select(WebhookEndpoint).where(
        WebhookEndpoint.project_id == project_id,
        WebhookEndpoint.name == name,
        WebhookEndpoint.url == url,
        WebhookEndpoint.event_types == list(event_types),
        WebhookEndpoint.created_at > func.now() - timedelta(seconds=seconds),
    )
    query = query.order_by(WebhookEndpoint.created_at.desc()).limit(1)
    return session.scalars(query).one_or_none()


def page_endpoints(
    session: Session, project_id: str, *, after: str | None, limit: int, order: Order
) -> tuple[list[WebhookEndpoint], bool]:
    """Returns a page of the project's endpoints, and whether more follow. Raises UnknownCursor."""
    query = select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id)
    return keyset_page(session, query, WebhookEndpoint, after=after, limit=limit, order=order)


def change_endpoint(
    session: Session, endpoint_id: str, **columns: Any
) -> WebhookEndpoint:  # Any: columns of WebhookEndpoint, by name
    """Sets columns of an endpoint that exists, and the time of its last change."""
    change = update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id)
    change = change.values(**columns, updated_at=func.now()).returning(WebhookEndpoint)
    return session.scalars(change, execution_options={"populate_existing": True}).one()


def rotate_secret(
    session: Session, endpoint: WebhookEndpoint, secret: str, *, overlap_seconds: float
) -> WebhookEndpoint:
    """Replaces the secret. The previous one signs as well for `overlap_seconds`, if not 0."""
    if not overlap_seconds:
        return change_endpoint(
            session,
            endpoint.id,
            secret=secret,
            previous_secret=None,
            previous_secret_expires_at=None,
        )
    return change_endpoint(
        session,
        endpoint.id,
        secret=secret,
        previous_secret=endpoint.secret,
        previous_secret_expires_at=func.now() + timedelta(seconds=overlap_seconds),
    )


def delete_endpoint(session: Session, project_id: str, endpoint_id: str) -> bool:
    """Deletes an endpoint with its deliveries. Returns False if the project does not have it."""
    gone = delete(WebhookEndpoint).where(
        WebhookEndpoint.id == endpoint_id, WebhookEndpoint.project_id == project_id
    )
    return session.scalar(gone.returning(WebhookEndpoint.id)) is not None
