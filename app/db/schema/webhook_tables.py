"""ORM classes of webhooks. They mirror the schema, which only migrations change."""

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db.schema.table import Json, Table, Timestamp


class WebhookEndpoint(Table):
    """A URL that receives the events of a project, with the secrets that sign them.

    The secrets are stored in plain text, because a signature cannot be made from a hash. The
    previous secret signs as well until it expires. `num_failures` and `failing_since` describe the
    failed attempts since the last success.
    """

    __tablename__ = "webhook_endpoints"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(200))
    url: Mapped[str] = mapped_column(String(2048))
    event_types: Mapped[list[str]] = mapped_column(ARRAY(String))
    secret: Mapped[str] = mapped_column(String(128))
    previous_secret: Mapped[str | None] = mapped_column(String(128))
    previous_secret_expires_at: Mapped[datetime | None] = mapped_column(Timestamp)
    num_failures: Mapped[int] = mapped_column(Integer, server_default="0")
    failing_since: Mapped[datetime | None] = mapped_column(Timestamp)
    disabled_at: Mapped[datetime | None] = mapped_column(Timestamp)
    disabled_reason: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    __table_args__ = (
        CheckConstraint(
            "(previous_secret IS NULL) = (previous_secret_expires_at IS NULL)",
            name="previous_secret_expires",
        ),
        CheckConstraint(
            "(disabled_at IS NULL) = (disabled_reason IS NULL)", name="reason_iff_disabled"
        ),
        Index("ix_webhook_endpoints_page", "project_id", "created_at", "id"),
    )


class WebhookEvent(Table):
    """An event of the outbox. It is inserted in the transaction of the change that it reports."""

    __tablename__ = "webhook_events"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    type: Mapped[str] = mapped_column(String(64))
    data: Mapped[Json] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    __table_args__ = (Index("ix_webhook_events_created_at", "created_at"),)


class WebhookDelivery(Table):
    """One event for one endpoint, with a log of its newest attempts.

    `lease_token` fences the writes of the process that makes an attempt, and `next_attempt_at` is
    then the end of its lease. `num_failures` is the position in the schedule of retries, which a
    replay starts again.
    """

    __tablename__ = "webhook_deliveries"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    event_id: Mapped[str] = mapped_column(
        ForeignKey("webhook_events.id", ondelete="CASCADE"), index=True
    )
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    status: Mapped[str] = mapped_column(String(16), server_default="pending")
    num_attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    num_failures: Mapped[int] = mapped_column(Integer, server_default="0")
    next_attempt_at: Mapped[datetime | None] = mapped_column(Timestamp)
    lease_token: Mapped[int | None] = mapped_column(BigInteger)
    attempts: Mapped[list[Json]] = mapped_column(JSONB, server_default=text("'[]'"))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'succeeded', 'failed')", name="status"),
        CheckConstraint(
            "(status = 'pending') = (next_attempt_at IS NOT NULL) "
            "AND (lease_token IS NULL OR status = 'pending')",
            name="next_attempt_iff_pending",
        ),
        Index("ix_webhook_deliveries_page", "endpoint_id", "created_at", "id"),
        Index(
            "ix_webhook_deliveries_due",
            "endpoint_id",
            "next_attempt_at",
            postgresql_where=text("status = 'pending'"),
        ),
    )
