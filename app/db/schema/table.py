"""Base class of the ORM classes, and column types."""

from typing import Any

from sqlalchemy import DateTime, MetaData
from sqlalchemy.orm import DeclarativeBase

Json = dict[str, Any]  # Any: open-ended JSON documents

naming = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
Timestamp = DateTime(timezone=True)


class Table(DeclarativeBase):
    """Base class of the ORM classes. It names constraints in the same way as the migrations."""

    metadata = MetaData(naming_convention=naming)
