"""ORM class of the runs of experiment trackers."""

from datetime import datetime

from sqlalchemy import BigInteger, Boolean, ForeignKey, Index, Integer, String, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db.schema.table import Json, Table, Timestamp


class TrackerRun(Table):
    """A job's run in one experiment tracker, with the position up to which metrics were sent.

    `sent` has the last step that was sent of each metric. `sending` is its value after the batch
    that is being sent, and null if there is no such batch. `state` belongs to the tracker.
    `num_claims` fences the writes of API processes: only the newest claim may change the row.
    """

    __tablename__ = "tracker_runs"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    type: Mapped[str] = mapped_column(String(16), primary_key=True)
    options: Mapped[Json] = mapped_column(JSONB)
    state: Mapped[Json] = mapped_column(JSONB, server_default=text("'{}'"))
    sent: Mapped[Json] = mapped_column(JSONB, server_default=text("'{}'"))
    sending: Mapped[Json | None] = mapped_column(JSONB)
    num_claims: Mapped[int] = mapped_column(BigInteger, server_default="0")
    num_failures: Mapped[int] = mapped_column(Integer, server_default="0")
    is_warned: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    due_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    closed_at: Mapped[datetime | None] = mapped_column(Timestamp)
    __table_args__ = (
        Index("ix_tracker_runs_due", "due_at", postgresql_where=text("closed_at IS NULL")),
    )
