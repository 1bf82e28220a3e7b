"""Output, errors and settings that all commands share."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from app.local.embedded_servers import apply_environment
from app.local.process_manager import set_environment
from app.settings import Settings, get_settings

console = Console()

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Data folder; default: STILLHOUSE_DATA_DIR, or .stillhouse."),
]


def use(data_dir: Path | None) -> Settings:
    """Returns the settings, with the given data folder if there is one."""
    if data_dir is not None:
        set_environment({"STILLHOUSE_DATA_DIR": str(data_dir.resolve())})
    return get_settings()


def use_service(data_dir: Path | None) -> Settings:
    """Returns the settings of the service that runs from the data folder or is set by variables.

    Exits with status 1 if there is none.
    """
    apply_environment(use(data_dir).data_dir)
    settings = get_settings()
    if not settings.database_url:
        fail(
            f"no service runs from {settings.data_dir.resolve()}: run `stillhouse up`, give --data-dir, "
            "or set STILLHOUSE_DATABASE_URL"
        )
    return settings


def fail(message: str) -> NoReturn:
    """Prints an error message and exits with status 1."""
    print(f"stillhouse: {message}", file=sys.stderr)
    raise typer.Exit(1)
