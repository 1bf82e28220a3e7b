"""Adds serving options of models, and pins of models that serve workers keep loaded."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Applies this migration."""
    op.add_column("models", sa.Column("serving", postgresql.JSONB()))
    op.create_table(
        "pins",
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("id", sa.String(length=200), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("project_id", "id", name="pk_pins"),
    )


def downgrade() -> None:
    """Reverts this migration."""
    op.drop_table("pins")
    op.drop_column("models", "serving")
