"""Output, errors and settings that all commands share.

Heavy modules are imported inside the functions, so that `stillhouse --help` is quick.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from app.settings import Settings

Json = dict[str, Any]  # Any: JSON bodies of the API
console = Console()
messages = Console(stderr=True)

# A terminal obeys control characters, so texts of the service must not reach it with them. Lone
# surrogates cannot be printed.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        is_eager=True,  # read before the URL of a service (app/commands/remote/connection.py)
        help="Data folder; default: STILLHOUSE_DATA_DIR, or .stillhouse.",
    ),
]
IsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def use(data_dir: Path | None) -> "Settings":
    """Returns the settings, with the given data folder if there is one."""
    from app.settings import get_settings

    if data_dir is not None:
        from app.local.process_manager import set_environment

        set_environment({"STILLHOUSE_DATA_DIR": str(data_dir.resolve())})
    return get_settings()


def use_service(data_dir: Path | None) -> "Settings":
    """Returns the settings of the service that runs from the data folder or is set by variables.

    Exits with status 1 if there is none.
    """
    from app.local.embedded_servers import apply_environment
    from app.settings import get_settings

    apply_environment(use(data_dir).data_dir)
    settings = get_settings()
    if not settings.database_url:
        fail(
            f"no service runs from {settings.data_dir.resolve()}: run `stillhouse up`, give --data-dir, "
            "or set STILLHOUSE_DATABASE_URL"
        )
    return settings


def tell(line: str) -> None:
    """Prints a line of a command's output, without markup or line breaks."""
    console.print(escaped(line), markup=False, highlight=False, soft_wrap=True)


def note(line: str) -> None:
    """Prints a line to standard error: a message that is not part of a command's output."""
    messages.print(escaped(line), markup=False, highlight=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """Prints an error message and exits with status 1."""
    print(f"stillhouse: {escaped(message)}", file=sys.stderr)
    raise typer.Exit(1)


def escaped(text: str) -> str:
    """Returns the text with its control characters, except tab and newline, as `\\u001b`."""
    return CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
