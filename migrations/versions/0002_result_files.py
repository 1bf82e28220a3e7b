"""Adds the ids of a job's result files."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Applies this migration."""
    column = sa.Column(
        "result_file_ids", postgresql.JSONB(), server_default=sa.text("'[]'"), nullable=False
    )
    op.add_column("jobs", column)


def downgrade() -> None:
    """Reverts this migration."""
    op.drop_column("jobs", "result_file_ids")
