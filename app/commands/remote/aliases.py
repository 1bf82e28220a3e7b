"""`stillhouse models alias`: names that can be moved from one model to another."""

from typing import TYPE_CHECKING, Annotated

import typer

from app.commands.remote.connection import over_http
from app.commands.remote.listing import After, All, Columns, Limit, Window, show_list
from app.commands.remote.output import Cell, confirm, moment, show_json
from app.commands.shell import IsJson, Json, tell

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

Alias = Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="The alias, such as faq@live.")]
HEADINGS = ("change", "created", "from", "to", "key")

aliases = typer.Typer(no_args_is_help=True, help="Aliases of models.")


@aliases.command("set")
@over_http
def set_alias(
    service: "RemoteService",
    alias: Alias,
    model: Annotated[str, typer.Argument(help="Id of the model that it shall point at.")],
    expected: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Only if it points at this model now."),
    ] = None,
    is_json: IsJson = False,
) -> None:
    """Points an alias at a model, and creates the alias if needed."""
    body = {"model": model} | ({"from": expected} if expected is not None else {})
    print_alias(service.put(path_of(alias), body), is_json=is_json)


@aliases.command("show")
@over_http
def show_alias(service: "RemoteService", alias: Alias, is_json: IsJson = False) -> None:
    """Shows the model that an alias points at."""
    print_alias(service.get(path_of(alias)), is_json=is_json)


@aliases.command("history")
@over_http
def list_history(
    service: "RemoteService",
    alias: Alias,
    limit: Limit = 20,
    after: After = None,
    is_all: All = False,
    is_json: IsJson = False,
) -> None:
    """Lists the changes of an alias, newest first."""
    window = Window(limit, after, is_all, is_json)
    show_list(service, path_of(alias, "history"), window, Columns(HEADINGS, change_row))


@aliases.command("rollback")
@over_http
def roll_back(service: "RemoteService", alias: Alias, is_json: IsJson = False) -> None:
    """Points an alias at the model before its newest change, or restores a deleted alias.

    If another change comes between, the service refuses the rollback.
    """
    now = service.fetch(path_of(alias))
    body = {"from": now.json()["model"]} if now.is_success else None
    print_alias(service.post(path_of(alias, "rollback"), body), is_json=is_json)


@aliases.command("delete")
@over_http
def delete_alias(
    service: "RemoteService",
    alias: Alias,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    is_json: IsJson = False,
) -> None:
    """Deletes an alias. The model and the history remain."""
    confirm(f"Delete the alias {alias}?", is_confirmed=yes)
    deleted = service.delete(path_of(alias))
    if is_json:
        show_json(deleted)
    else:
        tell(f"Deleted {alias}")


def path_of(alias: str, *parts: str) -> str:
    """Returns the path of an alias's route. Raises typer.BadParameter."""
    from app.commands.remote_service import object_path

    name, at, label = alias.partition("@")
    if not (name and at and label):
        raise typer.BadParameter(f"{alias!r} is not an alias; use the form name@alias")
    return object_path(object_path("/v1/models", name, "aliases"), label, *parts)


def print_alias(alias: Json, *, is_json: bool) -> None:
    """Prints the model that an alias points at."""
    if is_json:
        show_json(alias)
    else:
        tell(f"{alias['id']} points at {alias['model']}")


def change_row(change: Json) -> tuple[Cell, ...]:
    """Returns the cells of a change in a list."""
    created = moment(change["created_at"])
    return (change["id"], created, change["from"], change["to"], change["key_id"])
