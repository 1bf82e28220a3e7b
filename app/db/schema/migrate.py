"""Runs the migrations of the database schema."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from app.db.session import engine

MIGRATIONS = Path(__file__).parents[3] / "migrations"


def upgrade(url: str, revision: str = "head") -> None:
    """Applies the missing migrations in one transaction.

    A concurrent caller waits until this one has finished, and then has nothing to apply.
    """
    command.upgrade(_configuration(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Reverts all migrations that are newer than `revision`, in one transaction."""
    command.downgrade(_configuration(url), revision)


def _configuration(url: str) -> Config:
    configuration = Config()
    configuration.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    configuration.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return configuration


def revisions(url: str) -> tuple[str | None, str | None]:
    """Returns the revision of the database (None before the first one) and the newest one."""
    newest = ScriptDirectory.from_config(_configuration(url)).get_current_head()
    with engine().connect() as connection:
        return MigrationContext.configure(connection).get_current_revision(), newest
