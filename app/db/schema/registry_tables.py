"""ORM classes of the model registry that are not in `tables`: alias history, models of batches."""

from datetime import datetime

from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.db.schema.table import Table, Timestamp


class AliasChange(Table):
    """A change of an alias. `from_model` is null if it was created, `to_model` if it was deleted.

    The models may have been deleted since. `key_id` is the API key that made the change.
    """

    __tablename__ = "alias_changes"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    alias_id: Mapped[str] = mapped_column(String(200))
    from_model: Mapped[str | None] = mapped_column(String(200))
    to_model: Mapped[str | None] = mapped_column(String(200))
    key_id: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime] = mapped_column(Timestamp)
    __table_args__ = (Index("ix_alias_changes_page", "project_id", "alias_id", "created_at", "id"),)


class BatchModel(Table):
    """A model or an alias that the lines of a batch name, without the step of a checkpoint."""

    __tablename__ = "batch_models"
    batch_id: Mapped[str] = mapped_column(
        ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True
    )
    model_id: Mapped[str] = mapped_column(String(200), primary_key=True)
