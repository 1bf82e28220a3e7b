"""ORM classes of limits and usage. They mirror the schema, which only migrations change."""

from datetime import date, datetime

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Date, Index, Integer, String, func
from sqlalchemy.orm import Mapped, mapped_column

from app.db.schema.table import Table, Timestamp


class LimitColumns:
    """Limits of a key or a project. Null means unlimited. A day and a month begin in UTC."""

    requests_per_minute: Mapped[int | None] = mapped_column(Integer)
    tokens_per_minute: Mapped[int | None] = mapped_column(Integer)
    daily_tokens: Mapped[int | None] = mapped_column(BigInteger)
    monthly_tokens: Mapped[int | None] = mapped_column(BigInteger)


class ProjectLimits(LimitColumns, Table):
    """Limits that all keys of a project share. A project without a row is unlimited."""

    __tablename__ = "project_limits"
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)


class TokenUsage(Table):
    """Requests that ended in one minute, and their tokens. `key_id` is "" if it is not known.

    `input_tokens` includes `cached_tokens`, those that were in the prefix cache.
    """

    __tablename__ = "token_usage"
    minute: Mapped[datetime] = mapped_column(Timestamp, primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    model: Mapped[str] = mapped_column(String(256), primary_key=True)
    is_batch: Mapped[bool] = mapped_column(Boolean, primary_key=True)
    num_requests: Mapped[int] = mapped_column(BigInteger)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    __table_args__ = (Index("ix_token_usage_project", "project_id", "minute"),)


class TokenTotal(Table):
    """Tokens that a key or a project has used since the day or month that began on `began_on`.

    Budgets are compared with these rows, so that no query has to add up a month.
    """

    __tablename__ = "token_totals"
    owner_kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    owner_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    period: Mapped[str] = mapped_column(String(8), primary_key=True)
    began_on: Mapped[date] = mapped_column(Date)
    tokens: Mapped[int] = mapped_column(BigInteger)
    __table_args__ = (
        CheckConstraint("owner_kind IN ('key', 'project')", name="owner_kind"),
        CheckConstraint("period IN ('day', 'month')", name="period"),
    )


class UsageWriter(Table):
    """Number of the last write of an API process, so that a repeated write is not added twice."""

    __tablename__ = "usage_writers"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    num_writes: Mapped[int] = mapped_column(BigInteger)
    written_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
