"""Outbox of webhook events.

The functions that end jobs and batches call this module in their transaction. If the transaction is
rolled back, there is no event. If it is committed, the event cannot be lost.
"""

from typing import Final, Literal, get_args

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.schema.ids import new_id
from app.db.schema.tables import ENDED_BATCHES, Batch, Job
from app.db.schema.webhook_tables import WebhookDelivery, WebhookEndpoint, WebhookEvent

EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
]
EVENT_TYPES: Final[tuple[str, ...]] = get_args(EventType)


def add_job_event(session: Session, job: Job) -> None:
    """Adds the event of a job that has ended. Imports and data sets have no events."""
    if job.kind == "distillation" and job.project_id is not None:
        _add_event(session, job.project_id, f"fine_tuning.job.{job.status}", job.id)


def add_batch_event(session: Session, batch: Batch) -> None:
    """Adds the event of a batch, if it has ended."""
    if batch.status in ENDED_BATCHES:
        _add_event(session, batch.project_id, f"batch.{batch.status}", batch.id)


def _add_event(session: Session, project_id: str, event_type: str, object_id: str) -> None:
    """Adds an event and one delivery for each enabled endpoint that has subscribed to its type.

    An event without a subscriber is not stored.
    """
    assert event_type in EVENT_TYPES, event_type
    subscribed = select(WebhookEndpoint.id).where(
        WebhookEndpoint.project_id == project_id,
        WebhookEndpoint.event_types.contains([event_type]),
        WebhookEndpoint.disabled_at.is_(None),
    )
    # The lock prevents the deletion of the endpoints until the transaction ends. Without it, the
    # foreign key of a delivery could be violated, and the job or batch could not end.
    endpoint_ids = session.scalars(subscribed.with_for_update(read=True, key_share=True)).all()
    if not endpoint_ids:
        return
    event = WebhookEvent(
        id=new_id("evt_"), project_id=project_id, type=event_type, data={"id": object_id}
    )
    session.add(event)
    session.flush()
    for endpoint_id in endpoint_ids:
        session.add(
            WebhookDelivery(
                id=new_id("whd_"),
                event_id=event.id,
                endpoint_id=endpoint_id,
                next_attempt_at=func.now(),
            )
        )
    session.flush()
