"""How Alembic reaches the database: online only, one migrating process at a time."""

from alembic import context
from sqlalchemy import create_engine, pool, text

from app.db.session import sqlalchemy_url
from app.db.tables import Table
from app.settings import get_settings

MIGRATION_LOCK = 7_355_608  # any number that nothing else locks


def migrate() -> None:
    url = context.config.get_main_option("sqlalchemy.url") or get_settings().database_url
    engine = create_engine(sqlalchemy_url(url), poolclass=pool.NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        context.configure(connection=connection, target_metadata=Table.metadata)
        context.run_migrations()


migrate()
