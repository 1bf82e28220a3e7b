"""Adds the runs of experiment trackers, with the position up to which metrics were sent."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0014"
down_revision: str | None = "0013"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Applies this migration."""
    now, empty = sa.text("now()"), sa.text("'{}'")
    op.create_table(
        "tracker_runs",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("type", sa.String(length=16), nullable=False),
        sa.Column("options", postgresql.JSONB(), nullable=False),
        sa.Column("state", postgresql.JSONB(), server_default=empty, nullable=False),
        sa.Column("sent", postgresql.JSONB(), server_default=empty, nullable=False),
        sa.Column("sending", postgresql.JSONB(), nullable=True),
        sa.Column("num_claims", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("num_failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("is_warned", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_tracker_runs_job_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "type", name="pk_tracker_runs"),
    )
    op.create_index(
        "ix_tracker_runs_due",
        "tracker_runs",
        ["due_at"],
        postgresql_where=sa.text("closed_at IS NULL"),
    )


def downgrade() -> None:
    """Reverts this migration."""
    op.drop_table("tracker_runs")
