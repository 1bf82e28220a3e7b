"""ORM classes of stored completions. They mirror the schema, which only migrations change."""

from datetime import datetime

from sqlalchemy import BigInteger, Float, Index, Integer, String, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db.schema.table import Json, Table, Timestamp


class StoredCompletion(Table):
    """A chat completion that its client or its project wants to keep.

    `request`, `messages` and `completion` are JSON texts: the parameters of the request without its
    messages, its messages, and the complete `chat.completion`. `created_at` is the time of the
    request. `bytes` is the size of the three texts.
    """

    __tablename__ = "stored_completions"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(String(200))
    completion_metadata: Mapped[Json] = mapped_column(
        "metadata", JSONB, server_default=text("'{}'")
    )
    request_id: Mapped[str] = mapped_column(String(64))
    request: Mapped[str] = mapped_column(Text)
    messages: Mapped[str] = mapped_column(Text)
    completion: Mapped[str] = mapped_column(Text)
    bytes: Mapped[int] = mapped_column(BigInteger)
    latency_seconds: Mapped[float] = mapped_column(Float)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(Timestamp)
    stored_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    __table_args__ = (
        Index("ix_stored_completions_page", "project_id", "created_at", "id"),
        Index("ix_stored_completions_model", "project_id", "model", "created_at", "id"),
        Index(
            "ix_stored_completions_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
        ),
    )


class StoredUsage(Table):
    """Number and total size of a project's stored completions, kept by each insert and delete."""

    __tablename__ = "stored_usage"
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    num_completions: Mapped[int] = mapped_column(BigInteger)
    bytes: Mapped[int] = mapped_column(BigInteger)


class SpoolMark(Table):
    """Number of records of a spool segment that have been inserted or skipped.

    It is updated in the transaction that inserts the records, so each record is inserted once.
    """

    __tablename__ = "spool_marks"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    num_loaded: Mapped[int] = mapped_column(BigInteger)
