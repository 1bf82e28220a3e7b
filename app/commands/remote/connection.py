"""Options --url, --key and --data-dir of the commands that work over HTTP."""

import functools
import inspect
import os
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec

import typer

from app.commands.shell import use

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

PANEL: Final = "Connection"
URL_VARIABLE: Final = "STILLHOUSE_URL"
KEY_VARIABLE: Final = "STILLHOUSE_API_KEY"
Url = Annotated[
    str | None,
    typer.Option(
        help="URL of the service; default: STILLHOUSE_URL, or this machine.",
        rich_help_panel=PANEL,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--key",
        "--api-key",
        help="API key; default: STILLHOUSE_API_KEY, or on this machine the key in the data folder.",
        rich_help_panel=PANEL,
    ),
]
RemoteDataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Data folder of a service on this machine; it is used instead of STILLHOUSE_URL.",
        rich_help_panel=PANEL,
    ),
]
OPTIONS: Final = {"url": Url, "api_key": ApiKey, "data_dir": RemoteDataDir}
Options = ParamSpec("Options")


def connect(url: str | None, api_key: str | None, data_dir: Path | None) -> "RemoteService":
    """Returns a client of the service that the options name. Raises RemoteError."""
    from app.commands.remote_service import RemoteService, find_address

    settings, key = use(data_dir), chosen_key(url, api_key, data_dir)
    return RemoteService(find_address(settings, chosen_url(url, data_dir), key))


def chosen_url(url: str | None, data_dir: Path | None) -> str | None:
    """Returns --url, or else STILLHOUSE_URL; None for a service on this machine.

    The variable does not count if --data-dir is given.
    """
    if url is not None or data_dir is not None:
        return url
    return os.environ.get(URL_VARIABLE) or None


def chosen_key(url: str | None, api_key: str | None, data_dir: Path | None) -> str | None:
    """Returns --key, or else STILLHOUSE_API_KEY; None if neither is meant for the service.

    The variable does not count if --data-dir is used instead of STILLHOUSE_URL, because the key
    belongs to the service of that URL.
    """
    is_for_another = url is None and data_dir is not None and os.environ.get(URL_VARIABLE)
    if api_key is not None or is_for_another:
        return api_key
    return os.environ.get(KEY_VARIABLE) or None


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
