"""Adds the history of aliases, and the models that a batch uses."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Applies this migration."""
    op.create_table(
        "alias_changes",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("alias_id", sa.String(200), nullable=False),
        sa.Column("from_model", sa.String(200)),
        sa.Column("to_model", sa.String(200)),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index(
        "ix_alias_changes_page", "alias_changes", ["project_id", "alias_id", "created_at", "id"]
    )
    op.create_table(
        "batch_models",
        sa.Column(
            "batch_id",
            sa.String(64),
            sa.ForeignKey("batches.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("model_id", sa.String(200), primary_key=True),
    )


def downgrade() -> None:
    """Reverts this migration."""
    op.drop_table("batch_models")
    op.drop_table("alias_changes")
