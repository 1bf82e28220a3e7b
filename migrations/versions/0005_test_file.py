"""The file whose rows judge a job's student at the end."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("test_file_id", sa.String(length=64)))


def downgrade() -> None:
    op.drop_column("jobs", "test_file_id")
