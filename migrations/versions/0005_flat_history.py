"""Adds submissions, and indexes and counters for frequent queries.

With them, the cost of these queries does not depend on the number of ended jobs.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

ACTIVE = "status NOT IN ('succeeded', 'failed', 'cancelled')"
NEW_INDEXES: tuple[tuple[str, str, list[str], str | None], ...] = (
    ("ix_jobs_running", "jobs", ["id"], "status = 'running'"),
    ("ix_jobs_active", "jobs", ["project_id"], ACTIVE),
    ("ix_jobs_in_queue", "jobs", ["run_after", "id"], "status IN ('queued', 'retry_wait')"),
    (
        "ix_jobs_cancel_requested",
        "jobs",
        ["cancel_requested_at"],
        f"cancel_requested_at IS NOT NULL AND {ACTIVE}",
    ),
    ("ix_jobs_active_training_file", "jobs", ["training_file_id"], ACTIVE),
    ("ix_jobs_active_validation_file", "jobs", ["validation_file_id"], ACTIVE),
    ("ix_jobs_imports", "jobs", ["id"], "kind = 'import'"),
    ("ix_jobs_model_id", "jobs", ["model_id"], None),
    ("ix_checkpoints_deleting", "checkpoints", ["created_at"], "status = 'deleting'"),
    ("ix_files_store_key", "files", ["store_key"], None),
    ("ix_files_expires_at", "files", ["expires_at"], "expires_at IS NOT NULL"),
    ("ix_idempotency_keys_expires_at", "idempotency_keys", ["expires_at"], None),
)
BATCHES_BEFORE = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
BATCHES_AFTER = "status NOT IN ('completed', 'failed', 'expired', 'cancelled')"

COUNT_JOBS = """
CREATE FUNCTION count_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO job_counts (status, delta) VALUES (OLD.status, -1);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO job_counts (status, delta) VALUES (NEW.status, 1);
    END IF;
    RETURN NULL;
END $$
"""


def upgrade() -> None:
    """Applies this migration."""
    for name, table, columns, condition in NEW_INDEXES:
        where = sa.text(condition) if condition else None
        op.create_index(name, table, columns, unique=False, postgresql_where=where)
    op.drop_index("ix_jobs_leases", table_name="jobs")
    op.drop_index("ix_batches_active", table_name="batches")
    _index_active_batches(BATCHES_AFTER)
    op.create_table(
        "submissions",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("route", sa.String(length=128), nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("retry_count", sa.Integer(), nullable=False),
        sa.Column(
            "attempted_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("job_id", sa.String(length=64)),
        sa.PrimaryKeyConstraint("id", name="pk_submissions"),
    )
    op.create_index("ix_submissions_attempted_at", "submissions", ["attempted_at"], unique=False)
    op.create_index(
        "ix_submissions_match",
        "submissions",
        ["project_id", "request_sha256", "attempted_at"],
        unique=False,
    )
    op.create_table(
        "job_counts",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("delta", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job_counts"),
    )
    op.execute(COUNT_JOBS)
    # The triggers come first: creating them locks `jobs` against other writers until the commit, so
    # the count below is exact.
    op.execute(
        "CREATE TRIGGER jobs_count AFTER INSERT OR DELETE ON jobs FOR EACH ROW EXECUTE FUNCTION count_jobs()"
    )
    op.execute(
        "CREATE TRIGGER jobs_count_moves AFTER UPDATE OF status ON jobs FOR EACH ROW "
        "WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION count_jobs()"
    )
    op.execute(
        "INSERT INTO job_counts (status, delta) SELECT status, count(*) FROM jobs GROUP BY status"
    )


def downgrade() -> None:
    """Reverts this migration."""
    op.execute("DROP TRIGGER jobs_count_moves ON jobs")
    op.execute("DROP TRIGGER jobs_count ON jobs")
    op.execute("DROP FUNCTION count_jobs()")
    op.drop_table("job_counts")
    op.drop_table("submissions")
    op.drop_index("ix_batches_active", table_name="batches")
    _index_active_batches(BATCHES_BEFORE)
    op.create_index(
        "ix_jobs_leases",
        "jobs",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("status = 'running'"),
    )
    for name, table, _, _ in reversed(NEW_INDEXES):
        op.drop_index(name, table_name=table)


def _index_active_batches(condition: str) -> None:
    op.create_index(
        "ix_batches_active",
        "batches",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text(condition),
    )
