"""Creates the tables of API keys, files, models, jobs with their history, and idempotency keys."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

# Events may be deleted only together with their job. The cascade runs inside the trigger of the
# foreign key, so its trigger depth is greater than 1.
FORBID_CHANGES = """
CREATE FUNCTION forbid_changes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND pg_trigger_depth() > 1 THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME;
END $$
"""


def upgrade() -> None:
    """Applies this migration."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("secret_hmac", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", postgresql.ARRAY(sa.String()), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_index("ix_api_keys_project_id", "api_keys", ["project_id"], unique=False)
    op.create_table(
        "files",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("purpose", sa.String(length=32), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("store_key", sa.String(length=255), nullable=False),
        sa.Column("format", sa.String(length=32)),
        sa.Column("num_rows", sa.BigInteger()),
        sa.Column("max_row_bytes", sa.BigInteger()),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
    )
    op.create_index("ix_files_page", "files", ["project_id", "created_at", "id"], unique=False)
    op.create_table(
        "idempotency_keys",
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("route", sa.String(length=128), nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("response", postgresql.JSONB()),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("project_id", "key", "route", name="pk_idempotency_keys"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64)),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), server_default="queued", nullable=False),
        sa.Column("spec", postgresql.JSONB(), nullable=False),
        sa.Column("request", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("metadata", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("model_id", sa.String(length=200), nullable=False),
        sa.Column("training_file_id", sa.String(length=64)),
        sa.Column("validation_file_id", sa.String(length=64)),
        sa.Column("request_sha256", sa.String(length=64)),
        sa.Column("created_by_key_id", sa.String(length=32)),
        sa.Column(
            "run_after", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("num_losses", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_token", sa.BigInteger()),
        sa.Column("lease_owner", sa.String(length=128)),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True)),
        sa.Column("last_heartbeat_at", sa.DateTime(timezone=True)),
        sa.Column("last_rung_at", sa.DateTime(timezone=True)),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True)),
        sa.Column("pause_requested_at", sa.DateTime(timezone=True)),
        sa.Column("stage", sa.String(length=48)),
        sa.Column("stages", postgresql.JSONB(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("progress", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column(
            "latest_metrics", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False
        ),
        sa.Column("result", postgresql.JSONB()),
        sa.Column("result_model_id", sa.String(length=200)),
        sa.Column("trained_tokens", sa.BigInteger()),
        sa.Column("error", postgresql.JSONB()),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'retry_wait', 'paused', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_jobs_status"),
        ),
        sa.CheckConstraint(
            "(status = 'failed') = (error IS NOT NULL)", name=op.f("ck_jobs_error_iff_failed")
        ),
        sa.CheckConstraint(
            "(status = 'running') = (lease_token IS NOT NULL) AND (lease_token IS NULL) = (lease_expires_at IS NULL)",
            name=op.f("ck_jobs_lease_iff_running"),
        ),
        sa.CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name=op.f("ck_jobs_finished_iff_terminal"),
        ),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index(
        "ix_jobs_due",
        "jobs",
        ["run_after", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index(
        "ix_jobs_leases",
        "jobs",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_index("ix_jobs_page", "jobs", ["project_id", "created_at", "id"], unique=False)
    op.create_index(
        "ix_jobs_waiting",
        "jobs",
        ["run_after"],
        unique=False,
        postgresql_where=sa.text("status = 'retry_wait'"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("store_key", sa.String(length=255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("metrics", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("is_best", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("status", sa.String(length=16), server_default="committed", nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "status IN ('committed', 'corrupt', 'deleting')", name=op.f("ck_checkpoints_status")
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_checkpoints_job_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoints"),
        sa.UniqueConstraint(
            "job_id", "lease_token", "step", name="uq_checkpoints_job_id_lease_token_step"
        ),
    )
    op.create_table(
        "job_attempts",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=False),
        sa.Column("worker_id", sa.String(length=128), nullable=False),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("outcome", sa.String(length=32)),
        sa.Column("resumed_from", sa.BigInteger()),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_attempts_job_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "attempt", name="pk_job_attempts"),
        sa.UniqueConstraint("lease_token", name="uq_job_attempts_lease_token"),
    )
    op.create_table(
        "job_events",
        sa.Column("seq", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("level", sa.String(length=8), nullable=False),
        sa.Column("type", sa.String(length=24), nullable=False),
        sa.Column("message", sa.String(length=4000), nullable=False),
        sa.Column("data", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_events_job_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_job_events"),
        sa.UniqueConstraint("id", name="uq_job_events_id"),
    )
    op.create_index("ix_job_events_page", "job_events", ["job_id", "seq"], unique=False)
    op.create_table(
        "job_metrics",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_metrics_job_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "name", "step", name="pk_job_metrics"),
    )
    op.create_table(
        "models",
        sa.Column("id", sa.String(length=200), nullable=False),
        sa.Column("project_id", sa.String(length=64)),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("store_key", sa.String(length=255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("facts", postgresql.JSONB(), nullable=False),
        sa.Column("source_job_id", sa.String(length=64)),
        sa.Column("teacher_id", sa.String(length=200)),
        sa.Column("base_id", sa.String(length=200)),
        sa.Column("evaluation", postgresql.JSONB()),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint("origin IN ('imported', 'distilled')", name=op.f("ck_models_origin")),
        sa.ForeignKeyConstraint(["source_job_id"], ["jobs.id"], name="fk_models_source_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("source_job_id", name="uq_models_source_job_id"),
    )
    op.create_index("ix_models_project_id", "models", ["project_id"], unique=False)
    op.create_table(
        "aliases",
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("id", sa.String(length=200), nullable=False),
        sa.Column("model_id", sa.String(length=200), nullable=False),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.id"], name="fk_aliases_model_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("project_id", "id", name="pk_aliases"),
    )

    op.execute(sa.schema.CreateSequence(sa.Sequence("lease_tokens")))
    op.execute(FORBID_CHANGES)
    op.execute(
        "CREATE TRIGGER job_events_append_only BEFORE UPDATE OR DELETE ON job_events "
        "FOR EACH ROW EXECUTE FUNCTION forbid_changes()"
    )


def downgrade() -> None:
    """Reverts this migration."""
    op.drop_table("aliases")
    op.drop_index("ix_models_project_id", table_name="models")
    op.drop_table("models")
    op.drop_table("job_metrics")
    op.drop_index("ix_job_events_page", table_name="job_events")
    op.drop_table("job_events")
    op.drop_table("job_attempts")
    op.drop_table("checkpoints")
    op.drop_index(
        "ix_jobs_waiting", table_name="jobs", postgresql_where=sa.text("status = 'retry_wait'")
    )
    op.drop_index("ix_jobs_page", table_name="jobs")
    op.drop_index(
        "ix_jobs_leases", table_name="jobs", postgresql_where=sa.text("status = 'running'")
    )
    op.drop_index("ix_jobs_due", table_name="jobs", postgresql_where=sa.text("status = 'queued'"))
    op.drop_table("jobs")
    op.drop_table("idempotency_keys")
    op.drop_index("ix_files_page", table_name="files")
    op.drop_table("files")
    op.drop_index("ix_api_keys_project_id", table_name="api_keys")
    op.drop_table("api_keys")
    op.execute("DROP FUNCTION forbid_changes()")
    op.execute(sa.schema.DropSequence(sa.Sequence("lease_tokens")))
