"""Adds columns for resuming and deleting jobs, pause reasons, and record numbers of attempts.

Also removes metrics of checkpoints that belong to another step.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Applies this migration."""
    op.add_column("jobs", sa.Column("pause_reason", sa.Text()))
    op.add_column("jobs", sa.Column("resumed_at", sa.DateTime(timezone=True)))
    op.add_column("jobs", sa.Column("deleted_at", sa.DateTime(timezone=True)))
    op.create_index(
        "ix_jobs_deleted",
        "jobs",
        ["deleted_at"],
        postgresql_where=sa.text("deleted_at IS NOT NULL"),
    )
    records = sa.Column("num_records", sa.BigInteger(), server_default=sa.text("0"), nullable=False)
    op.add_column("job_attempts", records)
    # Older versions stored the metrics of the last evaluation, even if its step was another one.
    op.execute(
        "UPDATE checkpoints SET metrics = '{}' WHERE metrics <> '{}' AND NOT EXISTS ("
        "SELECT FROM job_metrics WHERE job_metrics.job_id = checkpoints.job_id "
        "AND job_metrics.step = checkpoints.step "
        "AND job_metrics.name IN (SELECT jsonb_object_keys(checkpoints.metrics)))"
    )


def downgrade() -> None:
    """Reverts this migration."""
    op.drop_column("job_attempts", "num_records")
    op.drop_index("ix_jobs_deleted", table_name="jobs")
    op.drop_column("jobs", "deleted_at")
    op.drop_column("jobs", "resumed_at")
    op.drop_column("jobs", "pause_reason")
