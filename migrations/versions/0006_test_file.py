"""Adds the file on whose rows a job evaluates its student at the end."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Applies this migration."""
    op.add_column("jobs", sa.Column("test_file_id", sa.String(length=64)))
    active = sa.text("status NOT IN ('succeeded', 'failed', 'cancelled')")
    op.create_index("ix_jobs_active_test_file", "jobs", ["test_file_id"], postgresql_where=active)


def downgrade() -> None:
    """Reverts this migration."""
    op.drop_index("ix_jobs_active_test_file", "jobs")
    op.drop_column("jobs", "test_file_id")
