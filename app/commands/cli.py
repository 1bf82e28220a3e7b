"""Runs a Stillhouse service, and works with one here or on another machine."""

from app.fast_imports import imports_done  # isort: split

import errno
import gc
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from app.commands import limit_commands, model_commands
from app.commands.limit_commands import (
    DailyTokens,
    MonthlyTokens,
    RequestsPerMinute,
    TokensPerMinute,
)
from app.commands.remote import batches, files, generation, jobs, usage
from app.commands.remote.output import Cell, moment, show_json, show_table
from app.commands.shell import DataDir, IsJson, Json, console, escaped, fail, use, use_service

imports_done()

KERNELS_MODULE = "worker.build_kernels"  # it needs torch, which this process does not load
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
HTTP_PANEL = "Over HTTP, here or from another machine"

# Modules with commands import heavy libraries inside the commands, so that help and shell
# completion are quick.
cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
keys = typer.Typer(no_args_is_help=True, help="API keys.")
keys.command("limit")(limit_commands.limit_key)
kernels = typer.Typer(no_args_is_help=True, help="C kernels for CPUs.")
cli.add_typer(jobs.jobs, name="jobs", rich_help_panel=HTTP_PANEL)
cli.add_typer(files.files, name="files", rich_help_panel=HTTP_PANEL)
cli.add_typer(batches.batches, name="batches", rich_help_panel=HTTP_PANEL)
cli.add_typer(model_commands.models, name="models", rich_help_panel=HTTP_PANEL)
cli.add_typer(keys, name="keys")
cli.add_typer(limit_commands.projects, name="projects")
cli.add_typer(kernels, name="kernels")
cli.command(rich_help_panel=HTTP_PANEL)(generation.generate)
cli.command(rich_help_panel=HTTP_PANEL)(generation.chat)
cli.command(rich_help_panel=HTTP_PANEL)(usage.usage)


@cli.command()
def up(
    data_dir: DataDir = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on; default 8400.")
    ] = None,
    train_workers: Annotated[int, typer.Option(min=0, max=64)] = 1,
    serve_workers: Annotated[int, typer.Option(min=0, max=64)] = 1,
) -> None:
    """Runs the whole service in this terminal: databases, API and workers.

    PostgreSQL or Valkey is not started if its URL is set. Ctrl-C drains and stops everything.
    """
    from app.commands.up import UpOptions, run_up

    settings = use(data_dir)
    run_up(
        UpOptions(
            data_dir=settings.data_dir.resolve(),
            host=host or settings.host,
            port=port or settings.port,
            train_workers=train_workers,
            serve_workers=serve_workers,
        ),
        console,
    )


@cli.command()
def api(data_dir: DataDir = None) -> None:
    """Runs the API only."""
    import uvicorn

    from app import crash_points
    from app.api.connections import BoundedProtocol

    settings = use_service(data_dir)
    crash_points.arm(settings.crash_dir)
    gc.disable()  # slows imports; `app.main.lifespan` switches it on
    uvicorn.run(
        "app.main:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        # Longer than clients keep idle connections, so that the server does not close a connection
        # on which a client is sending a request.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
    )


@cli.command()
def train_worker(data_dir: DataDir = None) -> None:
    """Runs one train worker."""
    become_worker("train", data_dir)


@cli.command()
def serve_worker(data_dir: DataDir = None) -> None:
    """Runs one serve worker."""
    become_worker("serve", data_dir)


@cli.command()
def migrate(data_dir: DataDir = None) -> None:
    """Migrates the database to the newest schema."""
    from app.db.schema.migrate import upgrade

    upgrade(use_service(data_dir).database_url)
    console.print("The database schema is up to date")


@cli.command()
def doctor(
    data_dir: DataDir = None,
    is_json: IsJson = False,
) -> None:
    """Checks a deployment and prints advice. The exit status is 1 if a check fails."""
    from app.commands.doctor import examine, report

    raise typer.Exit(report(examine(use_service(data_dir)), console, is_json=is_json))


@cli.command()
def demo(data_dir: DataDir = None) -> None:
    """Distils a real model on this machine and compares the teacher with the student."""
    from app.commands.demo import DemoFailed, run_demo

    try:
        run_demo(use(data_dir).data_dir.resolve())
    except DemoFailed as failure:
        fail(str(failure))


@keys.command("create")
def create_key(
    project: Annotated[str, typer.Option(help="Project that owns what the key creates.")],
    scopes: Annotated[
        list[str] | None,
        typer.Option(help="A scope; can be repeated. Default: all but admin and hub:token."),
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option(min=0.0, help="Days until the key expires.")
    ] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    daily_tokens: DailyTokens = None,
    monthly_tokens: MonthlyTokens = None,
    data_dir: DataDir = None,
) -> None:
    """Creates an API key and prints it as the last line. It cannot be shown again."""
    from app import auth
    from app.db.session import transaction
    from app.db.usage.limits import Limits

    given = limit_commands.limits_of(
        requests_per_minute, tokens_per_minute, daily_tokens, monthly_tokens
    )
    settings = use_service(data_dir)
    if settings.data_dir.is_dir():
        auth.ensure_pepper(settings)
    wanted = [scope for word in scopes or auth.TENANT_SCOPES for scope in word.split(",") if scope]
    expires_at = (
        datetime.now(UTC) + timedelta(days=expires_days) if expires_days is not None else None
    )
    with transaction() as session:
        key = auth.create_key(
            session, project, scopes=wanted, expires_at=expires_at, limits=Limits(**given)
        )
    print(f"API key of project {project} with the scopes {', '.join(sorted(set(wanted)))}:\n{key}")


@keys.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option()] = None,
    data_dir: DataDir = None,
    is_json: IsJson = False,
) -> None:
    """Lists API keys without their secrets."""
    from app.db import keys as table
    from app.db.session import transaction

    use_service(data_dir)
    with transaction() as session:
        rows = table.list_keys(session, project)
    listed = [
        {
            "id": row.id,
            "project": row.project_id,
            "scopes": list(row.scopes),
            "expires_at": row.expires_at and int(row.expires_at.timestamp()),
            "revoked_at": row.revoked_at and int(row.revoked_at.timestamp()),
        }
        for row in rows
    ]
    if is_json:
        show_json({"object": "list", "data": listed})
    else:
        show_table(("id", "project", "scopes", "expires", "revoked"), map(key_row, listed))


def key_row(key: Json) -> tuple[Cell, ...]:
    """Returns the cells of an API key in a list."""
    scopes = " ".join(key["scopes"])
    times = (moment(key["expires_at"]), moment(key["revoked_at"]))
    return (key["id"], key["project"], scopes, *times)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="Id of the key, or the whole key.")],
    data_dir: DataDir = None,
) -> None:
    """Revokes an API key immediately."""
    from app.auth import KEY_PATTERN
    from app.db import keys as table
    from app.db.session import transaction

    use_service(data_dir)
    match = KEY_PATTERN.fullmatch(key_id)
    with transaction() as session:
        is_revoked = table.revoke_key(session, match[1] if match else key_id)
    if not is_revoked:
        fail("there is no such key; `stillhouse keys list` shows all keys")
    print("Revoked")


@kernels.command("build")
def build_kernels() -> None:
    """Builds the C kernels for this processor, unless they are already built.

    Without a C compiler, slower PyTorch operations are used. The exit status is 1 if the compiler
    fails.
    """
    os.execv(sys.executable, [sys.executable, "-m", KERNELS_MODULE])


def become_worker(role: str, data_dir: Path | None) -> None:
    """Replaces this process with a worker of the role "train" or "serve"."""
    use_service(data_dir)
    os.execv(sys.executable, [sys.executable, "-m", "worker.main", role])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Expected errors are printed as one line, without a traceback."""
    try:
        cli(arguments, prog_name="stillhouse")
    except Exception as error:
        message = expected_message(error)
        if message is None:
            raise
        sys.exit(escaped(f"stillhouse: {message}"))


def expected_message(error: Exception) -> str | None:
    """Returns the message of an error that a user can act on, or None for a bug."""
    if isinstance(error, OSError) and (error.filename or error.errno in NO_SPACE):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if not isinstance(error, RuntimeError):  # imports nothing for errors of the HTTP commands
        from app.db.session import DatabaseUnavailable
        from app.errors import StillhouseError
        from app.local.server_process import LocalServiceError
        from app.storage import StorageError

        if isinstance(error, DatabaseUnavailable):
            return "the database does not answer; is the service running?"
        if not isinstance(error, StillhouseError | LocalServiceError | StorageError):
            return None
    return str(error.args[0] if error.args else error)


if __name__ == "__main__":
    main()
