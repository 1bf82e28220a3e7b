"""How Alembic reaches the database: online only, one migrating process at a time."""

from alembic import context
from sqlalchemy import create_engine, pool, text

from app.db.schema.tables import Table
from app.db.session import sqlalchemy_url
from app.settings import get_settings

LOCK_MILLISECONDS = 5000
MIGRATION_LOCK = 7_355_608  # any number that nothing else locks


def migrate() -> None:
    url = context.config.get_main_option("sqlalchemy.url") or get_settings().database_url
    engine = create_engine(sqlalchemy_url(url), poolclass=pool.NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        # All other statements queue behind a change of a table that waits: better to give up and be run again.
        connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}"))
        context.configure(connection=connection, target_metadata=Table.metadata)
        context.run_migrations()


migrate()
