"""Adds limits of keys and projects, and the usage of tokens."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0013"
down_revision: str | None = "0012"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

LIMITS = (
    ("requests_per_minute", sa.Integer),
    ("tokens_per_minute", sa.Integer),
    ("daily_tokens", sa.BigInteger),
    ("monthly_tokens", sa.BigInteger),
)
COUNTS = ("num_requests", "input_tokens", "cached_tokens", "output_tokens")


def upgrade() -> None:
    """Applies this migration."""
    for name, kind in LIMITS:
        op.add_column("api_keys", sa.Column(name, kind()))
    op.add_column("batches", sa.Column("created_by_key_id", sa.String(32)))
    op.create_table(
        "project_limits",
        sa.Column("project_id", sa.String(64), nullable=False),
        *(sa.Column(name, kind()) for name, kind in LIMITS),
        sa.PrimaryKeyConstraint("project_id", name="pk_project_limits"),
    )
    op.create_table(
        "token_usage",
        sa.Column("minute", sa.DateTime(timezone=True), nullable=False),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("is_batch", sa.Boolean(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in COUNTS),
        sa.PrimaryKeyConstraint(
            "minute", "project_id", "key_id", "model", "is_batch", name="pk_token_usage"
        ),
    )
    op.create_index("ix_token_usage_project", "token_usage", ["project_id", "minute"])
    op.create_table(
        "token_totals",
        sa.Column("owner_kind", sa.String(8), nullable=False),
        sa.Column("owner_id", sa.String(64), nullable=False),
        sa.Column("period", sa.String(8), nullable=False),
        sa.Column("began_on", sa.Date(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner_kind", "owner_id", "period", name="pk_token_totals"),
        sa.CheckConstraint(
            "owner_kind IN ('key', 'project')", name=op.f("ck_token_totals_owner_kind")
        ),
        sa.CheckConstraint("period IN ('day', 'month')", name=op.f("ck_token_totals_period")),
    )
    op.create_table(
        "usage_writers",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("num_writes", sa.BigInteger(), nullable=False),
        sa.Column(
            "written_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name="pk_usage_writers"),
    )


def downgrade() -> None:
    """Reverts this migration."""
    for table in ("usage_writers", "token_totals", "token_usage", "project_limits"):
        op.drop_table(table)
    op.drop_column("batches", "created_by_key_id")
    for name, _ in LIMITS:
        op.drop_column("api_keys", name)
