"""Tables by which retries of a request are recognised."""

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    Index,
    Integer,
    String,
    func,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db.schema.table import Json, Table, Timestamp


class IdempotencyKey(Table):
    """An idempotency key of a project for one route, with the response to repeat."""

    __tablename__ = "idempotency_keys"
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    route: Mapped[str] = mapped_column(String(128), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    response: Mapped[Json | None] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(Timestamp, index=True)


class Submission(Table):
    """A submission without an idempotency key, to which the client's retries are matched.

    `attempted_at` and `retry_count` describe the newest attempt; `job_id` is the job it created.
    """

    __tablename__ = "submissions"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    project_id: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str] = mapped_column(String(32))
    route: Mapped[str] = mapped_column(String(128))
    request_sha256: Mapped[str] = mapped_column(String(64))
    retry_count: Mapped[int] = mapped_column(Integer)
    attempted_at: Mapped[datetime] = mapped_column(Timestamp, index=True, server_default=func.now())
    job_id: Mapped[str | None] = mapped_column(String(64))
    __table_args__ = (
        Index("ix_submissions_match", "project_id", "request_sha256", "attempted_at"),
    )
