"""Options --url, --key and --data-dir of the commands that work over HTTP."""

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec

import typer

from app.commands.shell import use

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

PANEL: Final = "Connection"
OTHER_SERVICE: Final = "stillhouse.other_service"  # key in the metadata of a command


def chosen_url(context: typer.Context, url: str | None) -> str | None:
    """Returns --url or STILLHOUSE_URL. An explicit --data-dir is stronger than the variable."""
    is_here = context.params.get("data_dir") is not None
    context.meta[OTHER_SERVICE] = is_here and is_from_environment(context, "url")
    return None if context.meta[OTHER_SERVICE] else url


def chosen_key(context: typer.Context, key: str | None) -> str | None:
    """Returns --key or STILLHOUSE_API_KEY, unless the variable belongs to another service."""
    # An explicit key may be read before the URL.
    is_for_other = is_from_environment(context, "api_key") and context.meta[OTHER_SERVICE]
    return None if is_for_other else key


def is_from_environment(context: typer.Context, parameter: str) -> bool:
    """Returns whether the value of a parameter comes from a variable."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "ENVIRONMENT"


Url = Annotated[
    str | None,
    typer.Option(
        envvar="STILLHOUSE_URL",
        callback=chosen_url,
        help="URL of the service; default: this machine.",
        rich_help_panel=PANEL,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--key",
        "--api-key",
        envvar="STILLHOUSE_API_KEY",
        show_envvar=True,
        callback=chosen_key,
        help="API key; default on this machine: the key in the data folder.",
        rich_help_panel=PANEL,
    ),
]
RemoteDataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        is_eager=True,  # read before the URL
        help="Data folder of a service on this machine; it is used instead of STILLHOUSE_URL.",
        rich_help_panel=PANEL,
    ),
]
OPTIONS: Final = {"url": Url, "api_key": ApiKey, "data_dir": RemoteDataDir}
Options = ParamSpec("Options")


def connect(url: str | None, api_key: str | None, data_dir: Path | None) -> "RemoteService":
    """Returns a client of the service that the options name. Raises RemoteError."""
    from app.commands.remote_service import RemoteService, find_address

    return RemoteService(find_address(use(data_dir), url, api_key))


def over_http(
    function: "Callable[Concatenate[RemoteService, Options], None]",
) -> Callable[..., None]:
    """Returns the function as a command that connects to a service first.

    The options --url, --key and --data-dir replace the first parameter, which is the client.
    """

    @functools.wraps(function)
    def command(
        *,
        url: str | None,
        api_key: str | None,
        data_dir: Path | None,
        **options: Any,  # Any: the other options of the command, as typer parsed them
    ) -> None:
        """Connects to the service and runs the function."""
        with connect(url, api_key, data_dir) as service:
            function(service, **options)  # type: ignore[call-arg]  # typer passes them by name

    _, *own = inspect.signature(function).parameters.values()
    added = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in OPTIONS.items()
    ]
    parameters = [*(one.replace(kind=Parameter.KEYWORD_ONLY) for one in own), *added]
    # typer reads both of these.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # not in typeshed
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command
