"""Adds details of uploaded files, and the origin of models that were fine-tuned without a teacher."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

CHECK = "ck_models_origin"


def upgrade() -> None:
    """Applies this migration."""
    op.add_column("files", sa.Column("details", postgresql.JSONB()))
    op.drop_constraint(op.f(CHECK), "models")
    origins = "origin IN ('imported', 'distilled', 'fine-tuned')"
    op.create_check_constraint(op.f(CHECK), "models", origins)


def downgrade() -> None:
    """Reverts this migration. Models that were fine-tuned become distilled ones."""
    op.execute("UPDATE models SET origin = 'distilled' WHERE origin = 'fine-tuned'")
    op.drop_constraint(op.f(CHECK), "models")
    op.create_check_constraint(op.f(CHECK), "models", "origin IN ('imported', 'distilled')")
    op.drop_column("files", "details")
