"""Alembic environment: migrates a live database, by one process at a time."""

from alembic import context
from sqlalchemy import create_engine, pool, text

import app.db.schema.registry_tables
import app.db.schema.retry_tables
import app.db.schema.tables
import app.db.schema.tracker_tables
import app.db.schema.traffic_tables
import app.db.schema.usage_tables
import app.db.schema.webhook_tables  # noqa: F401  # all of them register their tables
from app.db.schema.table import Table
from app.db.session import sqlalchemy_url
from app.settings import get_settings

LOCK_MILLISECONDS = 5000
MIGRATION_LOCK = 7_355_608  # arbitrary, but not used by any other lock


def migrate() -> None:
    """Runs the migrations in one transaction, after acquiring the migration lock."""
    url = context.config.get_main_option("sqlalchemy.url") or get_settings().database_url
    engine = create_engine(sqlalchemy_url(url), poolclass=pool.NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        # A schema change that waits for its lock blocks all later statements on the table. So the
        # migration fails after a short wait, and can be run again.
        connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}"))
        context.configure(connection=connection, target_metadata=Table.metadata)
        context.run_migrations()


migrate()
