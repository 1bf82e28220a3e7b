"""Runs the Stillhouse service and manages its API keys and models."""

import os
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from app import crash_points
from app.commands.progress_lines import ProgressLines
from app.contracts.generation import EngineName, WeightsName
from app.contracts.messages import TERMINAL, JobStatus
from app.db.session import DatabaseUnavailable
from app.errors import StillhouseError
from app.local.embedded_servers import apply_environment
from app.local.process_manager import set_environment
from app.local.server_process import LocalServiceError
from app.settings import Settings, get_settings
from app.storage import StorageError

POLL_SECONDS = 0.3
KERNELS_MODULE = "worker.build_kernels"  # it needs torch, which this process does not load
PATIENCE_SECONDS = 10.0  # wait for a train worker after which a hint is printed

cli = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
keys = typer.Typer(no_args_is_help=True, help="API keys.")
models = typer.Typer(no_args_is_help=True, help="Registered models.")
cli.add_typer(keys, name="keys")
kernels = typer.Typer(no_args_is_help=True, help="C kernels for CPUs.")
cli.add_typer(models, name="models")
cli.add_typer(kernels, name="kernels")
console = Console()

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Data folder; default: STILLHOUSE_DATA_DIR, or .stillhouse."),
]


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

    from app.api.connections import BoundedProtocol

    settings = use_service(data_dir)
    crash_points.arm(settings.crash_dir)
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
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
    data_dir: DataDir = None,
) -> None:
    """Creates an API key and prints it as the last line. It cannot be shown again."""
    from app import auth
    from app.db.session import transaction

    settings = use_service(data_dir)
    if settings.data_dir.is_dir():
        auth.ensure_pepper(settings)
    wanted = [scope for word in scopes or auth.TENANT_SCOPES for scope in word.split(",") if scope]
    expires_at = (
        datetime.now(UTC) + timedelta(days=expires_days) if expires_days is not None else None
    )
    with transaction() as session:
        key = auth.create_key(session, project, scopes=wanted, expires_at=expires_at)
    print(f"API key of project {project} with the scopes {', '.join(sorted(set(wanted)))}:\n{key}")


@keys.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option()] = None, data_dir: DataDir = None
) -> None:
    """Lists API keys without their secrets."""
    from app.db import keys as table
    from app.db.session import transaction

    use_service(data_dir)
    with transaction() as session:
        rows = table.list_keys(session, project)
    shown = Table(Column("id", no_wrap=True), "project", "scopes", "expires", "revoked")
    for row in rows:
        shown.add_row(
            row.id,
            row.project_id,
            " ".join(row.scopes),
            str(row.expires_at or ""),
            str(row.revoked_at or ""),
        )
    console.print(shown)


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


@models.command("import")
def import_model(
    source: Annotated[str, typer.Argument(help="A folder, a .gguf file, or hf:org/name@revision.")],
    name: Annotated[str, typer.Option(help="Id of the new model.")],
    project: Annotated[
        str | None, typer.Option(help="The only project that sees the model; default: all.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Imports a model and waits until it is registered."""
    from app.services.imports import import_model

    use_service(data_dir)
    job_id = import_model(source, name, project_id=project)
    follow_import(job_id, name)


@models.command("list")
def list_models(
    project: Annotated[str, typer.Option(help="Project whose models to list.")] = "default",
    data_dir: DataDir = None,
) -> None:
    """Lists the models of a project, and those that all projects share."""
    from app.db import models as table
    from app.db.session import transaction

    use_service(data_dir)
    with transaction() as session:
        rows = table.list_models(session, project)
    shown = Table(
        Column("id", no_wrap=True), "family", Column("layers", justify="right"), "parameters", "MB"
    )
    for row in rows:
        facts = row.facts
        sizes = (
            str(facts["num_layers"]),
            f"{facts['num_parameters'] / 1e6:.1f} M",
            f"{row.bytes / 1e6:.0f}",
        )
        shown.add_row(row.id, facts["architecture"], *sizes)
    console.print(shown)


@models.command("serving")
def set_serving(
    model: Annotated[str, typer.Argument(help="Id or alias of the model.")],
    engine: Annotated[
        EngineName, typer.Option(help="Engine that serves the model.")
    ] = "transformers",
    weights: Annotated[
        WeightsName,
        typer.Option(help="plain: as trained. int8: smallest, but answers differ most."),
    ] = "auto",
    draft: Annotated[
        str | None, typer.Option(help="Draft model, which proposes tokens; default: none.")
    ] = None,
    num_tokens: Annotated[
        int, typer.Option(help="Number of tokens that the draft proposes at once.", min=1, max=16)
    ] = 4,
    project: Annotated[str, typer.Option(help="Project of the model.")] = "default",
    data_dir: DataDir = None,
) -> None:
    """Sets how a model is served. Options that are not given get their default values."""
    from pydantic import ValidationError

    from app.auth import Principal
    from app.schemas.serving import SetServing
    from app.services import model_serving

    use_service(data_dir)
    drafter = {"model": draft, "num_tokens": num_tokens} if draft else None
    try:
        asked = SetServing.model_validate({"engine": engine, "weights": weights, "draft": drafter})
    except ValidationError as error:
        fail(f"the draft {draft!r} is not a valid model id: {error.errors()[0]['msg']}")
    operator = Principal(project, "stillhouse", frozenset({"admin"}))
    row = model_serving.set_options(operator, model, asked)
    console.print(f"{row.id}: {asked.model_dump_json()}", highlight=False)


@kernels.command("build")
def build_kernels() -> None:
    """Builds the C kernels for this processor, unless they are already built.

    Without a C compiler, slower PyTorch operations are used. The exit status is 1 if the compiler
    fails.
    """
    os.execv(sys.executable, [sys.executable, "-m", KERNELS_MODULE])


def follow_import(job_id: str, name: str) -> None:
    """Shows the progress of an import until it ends. Exits with status 1 if it did not succeed."""
    from app.services.imports import load_import

    began, stage, is_explained = time.monotonic(), "", False
    lines = ProgressLines(console)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("waiting for a worker", total=100)
        while (job := load_import(job_id)).status not in TERMINAL:
            if job.stage and job.stage != stage:
                stage = job.stage
                bar.update(task, description=stage)
                if not console.is_terminal:
                    console.print(f"{name}: {stage}")
            percent = job.progress.get("percent", 0)
            bar.update(task, completed=percent)
            lines.tell(f"{name}: {stage or 'waiting for a worker'}  {percent:.0f}%")
            if (
                job.attempt == 0
                and not is_explained
                and time.monotonic() - began > PATIENCE_SECONDS
            ):
                is_explained = True
                console.print(
                    "No train worker has taken the job yet. Check that `stillhouse up` or a train worker is running."
                )
            time.sleep(POLL_SECONDS)
        bar.update(
            task,
            completed=100 if job.status == JobStatus.succeeded else job.progress.get("percent", 0),
        )
    if job.status != JobStatus.succeeded:
        fail((job.error or {}).get("message") or f"the import was {job.status}")
    console.print(f"Imported {name}", highlight=False)


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


def become_worker(role: str, data_dir: Path | None) -> None:
    """Replaces this process with a worker of the role "train" or "serve"."""
    use_service(data_dir)
    os.execv(sys.executable, [sys.executable, "-m", "worker.main", role])


def fail(message: str) -> NoReturn:
    """Prints an error message and exits with status 1."""
    print(f"stillhouse: {message}", file=sys.stderr)
    raise typer.Exit(1)


def main() -> None:
    """Runs the command line. Expected errors are printed as one line, without a traceback."""
    try:
        cli()
    except (StillhouseError, LocalServiceError, StorageError, RuntimeError) as error:
        sys.exit(f"stillhouse: {error.args[0] if error.args else error}")
    except DatabaseUnavailable:
        sys.exit("stillhouse: the database does not answer; is the service running?")


if __name__ == "__main__":
    main()
