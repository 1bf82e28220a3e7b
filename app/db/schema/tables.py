"""ORM classes. They mirror the schema, which only migrations change."""

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
from app.db.schema.usage_tables import LimitColumns

JOB_IS_ACTIVE = text("status NOT IN ('succeeded', 'failed', 'cancelled')")


lease_tokens = Sequence("lease_tokens", metadata=Table.metadata)


class ApiKey(LimitColumns, Table):
    """An API key. Its secret is shown once, and only an HMAC of the secret is stored."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64), index=True)
    secret_hmac: Mapped[bytes] = mapped_column(LargeBinary)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(String))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Timestamp)
    revoked_at: Mapped[datetime | None] = mapped_column(Timestamp)


class File(Table):
    """An uploaded file, or a result file of a job or a batch. `store_key` locates its bytes."""

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
    details: Mapped[Json | None] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Timestamp)
    __table_args__ = (
        Index("ix_files_page", "project_id", "created_at", "id"),
        Index("ix_files_store_key", "store_key"),
        Index("ix_files_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )


class Model(Table):
    """A registered model version. If `project_id` is null, all projects can use it.

    `serving` contains `ServingOptions`; null means the default options.
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
    __table_args__ = (
        CheckConstraint("origin IN ('imported', 'distilled', 'fine-tuned')", name="origin"),
    )


class Alias(Table):
    """An alias `name@alias` that points at a model version. It can be moved to another version."""

    __tablename__ = "aliases"
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class Pin(Table):
    """A model id or an alias of a project. Every serve worker keeps its model loaded."""

    __tablename__ = "pins"
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class Job(Table):
    """Job of kind `distillation`, `import` or `dataset`.

    `lease_token` fences the writes of its attempts.
    `num_losses` and the runtime that is compared with the limit are counted since `resumed_at`.
    `pause_reason` is null if the job's owner requested the pause.
    A row with `deleted_at` is hidden from its owner. The garbage collector removes it later.
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
    # The column keeps the name that its first migration gave it.
    last_notified_at: Mapped[datetime | None] = mapped_column("last_rung_at", Timestamp)
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
        # Does not contain lease_expires_at, so that a heartbeat need not update an index.
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
    """A change in the number of jobs in one state. The number is the sum of all changes.

    Triggers on `jobs` insert rows, so concurrent changes of job states never wait for each other.
    `app.db.jobs.fold_counts` replaces the rows with one sum per state.
    """

    __tablename__ = "job_counts"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    status: Mapped[str] = mapped_column(String(16))
    delta: Mapped[int] = mapped_column(BigInteger)


class Attempt(Table):
    """One run of a job by one worker. `worker_id` also identifies the claim.

    `num_records` is the number of the last committed record, by which repeated writes are detected.
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
    """One entry in the append-only history of a job, which is ordered by `seq`."""

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
    """One value of a metric at one step. A resumed run writes some steps again."""

    __tablename__ = "job_metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    value: Mapped[float] = mapped_column(Float)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class Checkpoint(Table):
    """A checkpoint. Inserting the row commits it; `status` says whether it can still be used."""

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
    """States of a batch, named as by OpenAI. `validating`: checked, and waiting for a runner."""

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
    """A file of generation requests. `lease_token` fences writes of the process that runs it."""

    __tablename__ = "batches"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    endpoint: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))
    created_by_key_id: Mapped[str | None] = mapped_column(String(32))
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
    model: Mapped[str | None] = mapped_column(String(200))  # of the first answer
    input_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cached_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    output_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
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
    """Output for one input line. Deleted when the batch's output and error files are created."""

    __tablename__ = "batch_results"
    batch_id: Mapped[str] = mapped_column(
        ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True
    )
    line: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    is_error: Mapped[bool] = mapped_column(Boolean)
    output: Mapped[str] = mapped_column(Text)
