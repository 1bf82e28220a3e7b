"""Adds batches of generation requests, and the results that await the output file."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


def upgrade() -> None:
    """Applies this migration."""
    op.create_table(
        "batches",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("endpoint", sa.String(length=32), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("metadata", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("input_file_id", sa.String(length=64), nullable=False),
        sa.Column("input_key", sa.String(length=255), nullable=False),
        sa.Column("output_file_id", sa.String(length=64)),
        sa.Column("error_file_id", sa.String(length=64)),
        sa.Column("output_expires_seconds", sa.Integer()),
        sa.Column("errors", postgresql.JSONB()),
        sa.Column("num_requests", sa.Integer(), server_default="0", nullable=False),
        sa.Column("num_completed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("num_failed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_token", sa.BigInteger()),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True)),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        *(sa.Column(name, sa.DateTime(timezone=True)) for name in TIMES),
        sa.CheckConstraint(
            "status IN ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', "
            "'cancelling', 'cancelled')",
            name=op.f("ck_batches_status"),
        ),
        sa.CheckConstraint(
            "(lease_token IS NULL) = (lease_expires_at IS NULL) AND (lease_token IS NULL "
            "OR status IN ('in_progress', 'finalizing', 'cancelling'))",
            name=op.f("ck_batches_lease_only_while_run"),
        ),
        sa.CheckConstraint(
            "(status = 'failed') = (errors IS NOT NULL)", name=op.f("ck_batches_errors_iff_failed")
        ),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
    )
    op.create_index("ix_batches_page", "batches", ["project_id", "created_at", "id"], unique=False)
    op.create_index(
        "ix_batches_active",
        "batches",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text(
            "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
        ),
    )
    op.create_table(
        "batch_results",
        sa.Column("batch_id", sa.String(length=64), nullable=False),
        sa.Column("line", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("is_error", sa.Boolean(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name="fk_batch_results_batch_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", "line", name="pk_batch_results"),
    )


def downgrade() -> None:
    """Reverts this migration."""
    op.drop_table("batch_results")
    op.drop_index("ix_batches_active", table_name="batches")
    op.drop_index("ix_batches_page", table_name="batches")
    op.drop_table("batches")
