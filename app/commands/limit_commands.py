"""Commands that show and change the limits of keys and projects."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final

import typer

from app.commands.remote.output import show_json, show_table
from app.commands.shell import DataDir, IsJson, fail, use_service

if TYPE_CHECKING:
    from app.db.usage.limits import Limits

projects = typer.Typer(no_args_is_help=True, help="Limits of projects.")
NONE: Final = "none"
MAX_DIGITS: Final = 40
HEADINGS: Final = ("project", "requests/min", "tokens/min", "tokens/day", "tokens/month")

RequestsPerMinute = Annotated[
    str | None, typer.Option(metavar="N|none", help="Requests per minute; none: unlimited.")
]
TokensPerMinute = Annotated[
    str | None, typer.Option(metavar="N|none", help="Tokens per minute; none: unlimited.")
]
DailyTokens = Annotated[
    str | None, typer.Option(metavar="N|none", help="Tokens per day (UTC); none: unlimited.")
]
MonthlyTokens = Annotated[
    str | None, typer.Option(metavar="N|none", help="Tokens per month (UTC); none: unlimited.")
]


def limits_of(
    requests_per_minute: str | None,
    tokens_per_minute: str | None,
    daily_tokens: str | None,
    monthly_tokens: str | None,
) -> dict[str, int | None]:
    """Returns the limits that are given, by name. Exits with status 1 if one is not a number."""
    from app.db.usage.limits import LIMIT_NAMES, MAX_BUDGET, MAX_PER_MINUTE

    given = (requests_per_minute, tokens_per_minute, daily_tokens, monthly_tokens)
    limits: dict[str, int | None] = {}
    for name, text in zip(LIMIT_NAMES, given, strict=True):
        if text is None:
            continue
        most = MAX_PER_MINUTE if name.endswith("_per_minute") else MAX_BUDGET
        digits = text.replace("_", "").replace(",", "")
        # `int` raises an error for texts with thousands of digits.
        is_number = digits.isdecimal() and len(digits) <= MAX_DIGITS
        if text != NONE and not (is_number and 1 <= int(digits) <= most):
            option = name.replace("_", "-")
            fail(
                f"--{option} must be a whole number from 1 to {most:,}, or none; it is {text[:MAX_DIGITS]}"
            )
        limits[name] = None if text == NONE else int(digits)
    return limits


def limit_key(
    key_id: Annotated[str, typer.Argument(help="Id of the key, or the whole key.")],
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    daily_tokens: DailyTokens = None,
    monthly_tokens: MonthlyTokens = None,
    data_dir: DataDir = None,
) -> None:
    """Changes the limits that are given, and prints all limits of a key."""
    from app.auth import KEY_PATTERN
    from app.db.session import transaction
    from app.db.usage.limits import set_key_limits

    changes = limits_of(requests_per_minute, tokens_per_minute, daily_tokens, monthly_tokens)
    use_service(data_dir)
    match = KEY_PATTERN.fullmatch(key_id)
    with transaction() as session:
        limits = set_key_limits(session, match[1] if match else key_id, changes)
    if limits is None:
        fail("there is no such key; `stillhouse keys list` shows all keys")
    print_limits(limits)


@projects.command("limit")
def limit_project(
    project: Annotated[str, typer.Argument(help="Name of the project.")],
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    daily_tokens: DailyTokens = None,
    monthly_tokens: MonthlyTokens = None,
    data_dir: DataDir = None,
) -> None:
    """Changes the limits that are given, and prints all limits that a project's keys share."""
    from app.auth import check_project_name
    from app.db.session import transaction
    from app.db.usage.limits import set_project_limits

    changes = limits_of(requests_per_minute, tokens_per_minute, daily_tokens, monthly_tokens)
    use_service(data_dir)
    check_project_name(project)
    with transaction() as session:
        limits = set_project_limits(session, project, changes)
    print_limits(limits)


@projects.command("list")
def list_projects(data_dir: DataDir = None, is_json: IsJson = False) -> None:
    """Lists the projects that have limits."""
    from app.db.session import transaction
    from app.db.usage.limits import list_project_limits

    use_service(data_dir)
    with transaction() as session:
        rows = list_project_limits(session)
    if is_json:
        data = [{"project": project, **asdict(limits)} for project, limits in rows]
        show_json({"object": "list", "data": data})
    else:
        table = [(project, *map(_shown, asdict(limits).values())) for project, limits in rows]
        show_table(HEADINGS, table)


def print_limits(limits: "Limits") -> None:
    """Prints one limit per line."""
    values: Mapping[str, int | None] = asdict(limits)
    for name, value in values.items():
        print(f"{name}: {_shown(value)}")


def _shown(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"
