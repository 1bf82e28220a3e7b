"""Adds stored chat completions, their usage per project, and the marks of spool segments."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0011"
down_revision: str | None = "0010"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Applies this migration."""
    now = sa.text("now()")
    op.create_table(
        "stored_completions",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("metadata", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("messages", sa.Text(), nullable=False),
        sa.Column("completion", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("latency_seconds", sa.Float(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("stored_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_stored_completions"),
    )
    op.create_index(
        "ix_stored_completions_page", "stored_completions", ["project_id", "created_at", "id"]
    )
    op.create_index(
        "ix_stored_completions_model",
        "stored_completions",
        ["project_id", "model", "created_at", "id"],
    )
    op.create_index(
        "ix_stored_completions_metadata",
        "stored_completions",
        ["metadata"],
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
    )
    op.create_table(
        "stored_usage",
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("num_completions", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("project_id", name="pk_stored_usage"),
    )
    op.create_table(
        "spool_marks",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("num_loaded", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_spool_marks"),
    )


def downgrade() -> None:
    """Reverts this migration."""
    op.drop_table("spool_marks")
    op.drop_table("stored_usage")
    op.drop_table("stored_completions")
