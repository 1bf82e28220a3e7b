"""Adds the model and the number of tokens of a batch."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

COUNTS = ("input_tokens", "cached_tokens", "output_tokens")


def upgrade() -> None:
    """Applies this migration."""
    op.add_column("batches", sa.Column("model", sa.String(200)))
    for name in COUNTS:
        zero = sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False)
        op.add_column("batches", zero)


def downgrade() -> None:
    """Reverts this migration."""
    for name in (*COUNTS, "model"):
        op.drop_column("batches", name)
