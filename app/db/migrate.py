"""Brings a database to the newest schema."""

from pathlib import Path

from alembic import command
from alembic.config import Config

MIGRATIONS = Path(__file__).parents[2] / "migrations"


def upgrade(url: str, revision: str = "head") -> None:
    """Applies what is missing, in one transaction; a second caller waits and then finds nothing to do."""
    command.upgrade(_configuration(url), revision)


def downgrade(url: str, revision: str) -> None:
    command.downgrade(_configuration(url), revision)


def _configuration(url: str) -> Config:
    configuration = Config()
    configuration.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    configuration.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return configuration
