"""ORM classes. The schema itself changes only by migrations; these mirror it."""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Sequence,
    String,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db.schema.table import Json, Table, Timestamp

JOB_IS_ACTIVE = text("status NOT IN ('succeeded', 'failed', 'cancelled')")


lease_tokens = Sequence("lease_tokens", metadata=Table.metadata)


class ApiKey(Table):
    """A key shown once; only an HMAC of its secret is kept."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64), index=True)
    secret_hmac: Mapped[bytes] = mapped_column(LargeBinary)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(String))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Timestamp)
    revoked_at: Mapped[datetime | None] = mapped_column(Timestamp)


class File(Table):
    __tablename__ = "files"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    store_key: Mapped[str] = mapped_column(String(255))
    format: Mapped[str | None] = mapped_column(String(32))
    num_rows: Mapped[int | None] = mapped_column(BigInteger)
    max_row_bytes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Timestamp)
    __table_args__ = (
        Index("ix_files_page", "project_id", "created_at", "id"),
        Index("ix_files_store_key", "store_key"),
        Index("ix_files_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )


class Model(Table):
    """A registered version: imported or distilled. project_id null means every project sees it.

    serving holds `ServingOptions`; null means the plain way.
    """

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    project_id: Mapped[str | None] = mapped_column(String(64), index=True)
    origin: Mapped[str] = mapped_column(String(16))
    store_key: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    facts: Mapped[Json] = mapped_column(JSONB)
    source_job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), unique=True)
    teacher_id: Mapped[str | None] = mapped_column(String(200))
    base_id: Mapped[str | None] = mapped_column(String(200))
    evaluation: Mapped[Json | None] = mapped_column(JSONB)
    serving: Mapped[Json | None] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    __table_args__ = (CheckConstraint("origin IN ('imported', 'distilled')", name="origin"),)


class Alias(Table):
    """`name@alias` points at a version and can be moved."""

    __tablename__ = "aliases"
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class Pin(Table):
    """What a project wants every serve worker to keep loaded: a model, or whatever an alias points at."""

    __tablename__ = "pins"
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class Job(Table):
    """A job of kind `distillation` or `import`. Every write of a running attempt is fenced by lease_token.

    num_losses, and the runtime that is compared with the limit, count from resumed_at on.
    pause_reason is null for a pause that the job's owner asked for.
    A row with deleted_at is hidden from its owner; the garbage collector removes it.
    """

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str | None] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16), server_default="queued")
    spec: Mapped[Json] = mapped_column(JSONB)
    request: Mapped[Json] = mapped_column(JSONB, server_default=text("'{}'"))
    job_metadata: Mapped[Json] = mapped_column("metadata", JSONB, server_default=text("'{}'"))
    model_id: Mapped[str] = mapped_column(String(200))
    training_file_id: Mapped[str | None] = mapped_column(String(64))
    validation_file_id: Mapped[str | None] = mapped_column(String(64))
    test_file_id: Mapped[str | None] = mapped_column(String(64))
    request_sha256: Mapped[str | None] = mapped_column(String(64))
    created_by_key_id: Mapped[str | None] = mapped_column(String(32))

    run_after: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    attempt: Mapped[int] = mapped_column(Integer, server_default="0")
    num_losses: Mapped[int] = mapped_column(Integer, server_default="0")
    lease_token: Mapped[int | None] = mapped_column(BigInteger)
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[datetime | None] = mapped_column(Timestamp)
    last_heartbeat_at: Mapped[datetime | None] = mapped_column(Timestamp)
    last_rung_at: Mapped[datetime | None] = mapped_column(Timestamp)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(Timestamp)
    pause_requested_at: Mapped[datetime | None] = mapped_column(Timestamp)
    pause_reason: Mapped[str | None] = mapped_column(Text)
    resumed_at: Mapped[datetime | None] = mapped_column(Timestamp)

    stage: Mapped[str | None] = mapped_column(String(48))
    stages: Mapped[list[Json]] = mapped_column(JSONB, server_default=text("'[]'"))
    progress: Mapped[Json] = mapped_column(JSONB, server_default=text("'{}'"))
    latest_metrics: Mapped[Json] = mapped_column(JSONB, server_default=text("'{}'"))
    result: Mapped[Json | None] = mapped_column(JSONB)
    result_model_id: Mapped[str | None] = mapped_column(String(200))
    result_file_ids: Mapped[list[str]] = mapped_column(JSONB, server_default=text("'[]'"))
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[Json | None] = mapped_column(JSONB)

    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    started_at: Mapped[datetime | None] = mapped_column(Timestamp)
    finished_at: Mapped[datetime | None] = mapped_column(Timestamp)
    deleted_at: Mapped[datetime | None] = mapped_column(Timestamp)
    __table_args__ = (
        CheckConstraint(
            "status IN ('queued', 'running', 'retry_wait', 'paused', 'succeeded', 'failed', 'cancelled')",
            name="status",
        ),
        CheckConstraint(
            "(status = 'running') = (lease_token IS NOT NULL) "
            "AND (lease_token IS NULL) = (lease_expires_at IS NULL)",
            name="lease_iff_running",
        ),
        CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name="finished_iff_terminal",
        ),
        CheckConstraint("(status = 'failed') = (error IS NOT NULL)", name="error_iff_failed"),
        Index("ix_jobs_page", "project_id", "created_at", "id"),
        Index("ix_jobs_due", "run_after", "id", postgresql_where=text("status = 'queued'")),
        Index("ix_jobs_waiting", "run_after", postgresql_where=text("status = 'retry_wait'")),
        # Without lease_expires_at, so that a heartbeat changes no index.
        Index("ix_jobs_running", "id", postgresql_where=text("status = 'running'")),
        Index("ix_jobs_active", "project_id", postgresql_where=JOB_IS_ACTIVE),
        Index(
            "ix_jobs_in_queue",
            "run_after",
            "id",
            postgresql_where=text("status IN ('queued', 'retry_wait')"),
        ),
        Index(
            "ix_jobs_cancel_requested",
            "cancel_requested_at",
            postgresql_where=text(f"cancel_requested_at IS NOT NULL AND {JOB_IS_ACTIVE.text}"),
        ),
        Index("ix_jobs_active_training_file", "training_file_id", postgresql_where=JOB_IS_ACTIVE),
        Index(
            "ix_jobs_active_validation_file", "validation_file_id", postgresql_where=JOB_IS_ACTIVE
        ),
        Index("ix_jobs_active_test_file", "test_file_id", postgresql_where=JOB_IS_ACTIVE),
        Index("ix_jobs_imports", "id", postgresql_where=text("kind = 'import'")),
        Index("ix_jobs_model_id", "model_id"),
        Index("ix_jobs_deleted", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
    )


class JobCount(Table):
    """Changes of the number of jobs in a state; the number is their sum.

    A trigger of the table `jobs` adds rows, so transactions that move jobs never wait for each other.
    `fold_counts` replaces the rows by their sums.
    """

    __tablename__ = "job_counts"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    status: Mapped[str] = mapped_column(String(16))
    delta: Mapped[int] = mapped_column(BigInteger)


class Attempt(Table):
    """One run of a job by one worker; worker_id names the claim too.

    num_records is the number of the last record of the run that was committed, so that a retry adds nothing.
    """

    __tablename__ = "job_attempts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    lease_token: Mapped[int] = mapped_column(BigInteger, unique=True)
    worker_id: Mapped[str] = mapped_column(String(128))
    started_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    ended_at: Mapped[datetime | None] = mapped_column(Timestamp)
    outcome: Mapped[str | None] = mapped_column(String(32))
    resumed_from: Mapped[int | None] = mapped_column(BigInteger)
    num_records: Mapped[int] = mapped_column(BigInteger, server_default="0")


class Event(Table):
    """Append-only history of a job; `seq` orders it."""

    __tablename__ = "job_events"
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(24))
    message: Mapped[str] = mapped_column(String(4000))
    data: Mapped[Json] = mapped_column(JSONB, server_default=text("'{}'"))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    __table_args__ = (Index("ix_job_events_page", "job_id", "seq"),)


class Metric(Table):
    """One value of one series; a resumed run writes the same steps again with the same values."""

    __tablename__ = "job_metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    value: Mapped[float] = mapped_column(Float)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class Checkpoint(Table):
    """A committed checkpoint: this row is the commit."""

    __tablename__ = "checkpoints"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    lease_token: Mapped[int] = mapped_column(BigInteger)
    step: Mapped[int] = mapped_column(BigInteger)
    store_key: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    metrics: Mapped[Json] = mapped_column(JSONB, server_default=text("'{}'"))
    is_best: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    status: Mapped[str] = mapped_column(String(16), server_default="committed")
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    __table_args__ = (
        UniqueConstraint("job_id", "lease_token", "step"),
        CheckConstraint("status IN ('committed', 'corrupt', 'deleting')", name="status"),
        Index(
            "ix_checkpoints_deleting", "created_at", postgresql_where=text("status = 'deleting'")
        ),
    )


class BatchStatus(StrEnum):
    """States of a batch, by OpenAI's names. `validating` is checked already, and waits for a runner."""

    validating = "validating"
    failed = "failed"
    in_progress = "in_progress"
    finalizing = "finalizing"
    completed = "completed"
    expired = "expired"
    cancelling = "cancelling"
    cancelled = "cancelled"


ENDED_BATCHES = frozenset(
    {BatchStatus.failed, BatchStatus.completed, BatchStatus.expired, BatchStatus.cancelled}
)


class Batch(Table):
    """A file of generation requests. Every write of the API process that runs it is fenced by lease_token."""

    __tablename__ = "batches"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    endpoint: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))
    batch_metadata: Mapped[Json] = mapped_column("metadata", JSONB, server_default=text("'{}'"))
    input_file_id: Mapped[str] = mapped_column(String(64))
    input_key: Mapped[str] = mapped_column(String(255))
    output_file_id: Mapped[str | None] = mapped_column(String(64))
    error_file_id: Mapped[str | None] = mapped_column(String(64))
    output_expires_seconds: Mapped[int | None] = mapped_column(Integer)
    errors: Mapped[list[Json] | None] = mapped_column(JSONB)
    num_requests: Mapped[int] = mapped_column(Integer, server_default="0")
    num_completed: Mapped[int] = mapped_column(Integer, server_default="0")
    num_failed: Mapped[int] = mapped_column(Integer, server_default="0")
    lease_token: Mapped[int | None] = mapped_column(BigInteger)
    lease_expires_at: Mapped[datetime | None] = mapped_column(Timestamp)

    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(Timestamp)
    in_progress_at: Mapped[datetime | None] = mapped_column(Timestamp)
    finalizing_at: Mapped[datetime | None] = mapped_column(Timestamp)
    completed_at: Mapped[datetime | None] = mapped_column(Timestamp)
    failed_at: Mapped[datetime | None] = mapped_column(Timestamp)
    expired_at: Mapped[datetime | None] = mapped_column(Timestamp)
    cancelling_at: Mapped[datetime | None] = mapped_column(Timestamp)
    cancelled_at: Mapped[datetime | None] = mapped_column(Timestamp)
    __table_args__ = (
        CheckConstraint(
            "status IN ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', "
            "'cancelling', 'cancelled')",
            name="status",
        ),
        CheckConstraint(
            "(lease_token IS NULL) = (lease_expires_at IS NULL) AND (lease_token IS NULL "
            "OR status IN ('in_progress', 'finalizing', 'cancelling'))",
            name="lease_only_while_run",
        ),
        CheckConstraint("(status = 'failed') = (errors IS NOT NULL)", name="errors_iff_failed"),
        Index("ix_batches_page", "project_id", "created_at", "id"),
        Index(
            "ix_batches_active",
            "created_at",
            postgresql_where=text("status NOT IN ('completed', 'failed', 'expired', 'cancelled')"),
        ),
    )


class BatchResult(Table):
    """The line that the answer to one input line is in the output file; gone when the file is made."""

    __tablename__ = "batch_results"
    batch_id: Mapped[str] = mapped_column(
        ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True
    )
    line: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    is_error: Mapped[bool] = mapped_column(Boolean)
    output: Mapped[str] = mapped_column(Text)


class IdempotencyKey(Table):
    __tablename__ = "idempotency_keys"
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    route: Mapped[str] = mapped_column(String(128), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    response: Mapped[Json | None] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(Timestamp, index=True)


class Submission(Table):
    """A submission without an idempotency key; retries of a client are matched to it.

    `attempted_at` and `retry_count` are those of its newest attempt; `job_id` is the job that it created.
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
