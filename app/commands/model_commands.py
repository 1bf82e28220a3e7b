"""`stillhouse models`: imports, lists, downloads and publishes models."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.commands.progress_lines import ENDED, ProgressLines
from app.commands.remote.aliases import aliases
from app.commands.remote.connection import ApiKey, Url, connect, over_http
from app.commands.remote.registry import registry, show_models
from app.commands.shell import (
    DataDir,
    IsJson,
    Json,
    console,
    escaped,
    fail,
    note,
    tell,
    use,
    use_service,
)
from app.contracts.engines import EngineOption, WeightsName

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService
    from app.db.schema.tables import Job

POLL_SECONDS = 0.3
PATIENCE_SECONDS = 10.0  # wait for a train worker after which a hint is printed

models = typer.Typer(no_args_is_help=True, help="Registered models.")
models.add_typer(registry)
models.add_typer(aliases, name="alias")


@models.command("import")
def import_model(
    source: Annotated[
        str,
        typer.Argument(help="A folder, a .gguf, tar or zip file, or hf:org/name@revision."),
    ],
    name: Annotated[str, typer.Option(help="Id of the new model.")],
    project: Annotated[
        str | None,
        typer.Option(
            help="The only project that sees the model; default: all, or with --url that of the key."
        ),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Imports a model and waits until it is registered. With --url, uploads it over HTTP."""
    if url is None:
        from app.services import imports

        use_service(data_dir)
        job_id = imports.import_model(source, name, project_id=project)
        follow_import(name, lambda: ImportState.of_job(imports.load_import(job_id)))
        return
    if project is not None:
        fail("with --url, the model belongs to the project of the API key; leave --project out")
    from app.commands.model_uploads import start_import

    with connect(url, api_key, data_dir) as service:
        path = f"/v1/models/imports/{start_import(service, source, name, tell)['id']}"
        follow_import(name, lambda: ImportState.of_json(service.get_patiently(path)))


@models.command("list")
def list_models(
    project: Annotated[
        str | None,
        typer.Option(help="Read this project's models from the database of this machine instead."),
    ] = None,
    is_json: IsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Lists the models that the API key may use: those of its project, and shared ones."""
    if project is None:
        with connect(url, api_key, data_dir) as service:
            show_models(service.get("/v1/models"), is_json=is_json)
        return
    if url is not None:
        fail("--project reads the database of this machine; leave --url and STILLHOUSE_URL out")
    from app.db import models as table
    from app.db.session import transaction
    from app.schemas.models import ModelList, ModelObject

    use_service(data_dir)
    with transaction() as session:
        names = table.aliases_of_models(session, project)
        rows = table.list_models(session, project)
        found = ModelList(data=[ModelObject.of(row, names.get(row.id, [])) for row in rows])
    show_models(found.model_dump(mode="json"), is_json=is_json)


@models.command("serving")
def set_serving(
    model: Annotated[str, typer.Argument(help="Id or alias of the model.")],
    engine: Annotated[
        EngineOption, typer.Option(help="Engine that serves the model.")
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
        options = SetServing.model_validate(
            {"engine": engine, "weights": weights, "draft": drafter}
        )
    except ValidationError as error:
        fail(f"the draft {draft!r} is not a valid model id: {error.errors()[0]['msg']}")
    operator = Principal(project, "stillhouse", frozenset({"admin"}))
    row = model_serving.set_options(operator, model, options)
    tell(f"{row.id}: {options.model_dump_json()}")


@models.command("pull")
@over_http
def pull_model(
    service: "RemoteService",
    model: Annotated[str, typer.Argument(help="Id, alias or checkpoint of the model.")],
    folder: Annotated[Path, typer.Argument(help="Folder for the files; created if missing.")],
    parallel: Annotated[
        int, typer.Option(min=1, max=32, help="Number of files downloaded at the same time.")
    ] = 4,
) -> None:
    """Downloads a model over HTTP. Run the command again to continue after an interruption."""
    from app.commands.model_downloads import Pull

    files = Pull(service, folder, tell, num_parallel=parallel).run(model)
    tell(f"{folder} has the {len(files)} files of {model}; all SHA-256 sums match")


@models.command("push")
def push_model(
    model: Annotated[str, typer.Argument(help="Id or alias of the model.")],
    repository: Annotated[str, typer.Argument(help="Repository on the hub: org/name.")],
    hub: Annotated[
        str | None,
        typer.Option(help="URL of the hub; default: STILLHOUSE_HF_ENDPOINT, or Hugging Face."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; default: main.")] = None,
    private: Annotated[bool, typer.Option(help="Whether a new repository is private.")] = True,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Publishes a model on a Hugging Face hub. The token is STILLHOUSE_HF_TOKEN."""
    from app.commands.model_pushes import Hub, push

    settings = use(data_dir)
    with connect(url, api_key, data_dir) as service:
        commit_url = push(
            service,
            model,
            repository,
            hub=Hub.of(settings, hub),
            revision=revision,
            is_private=private,
            data_dir=settings.data_dir,
            tell=tell,
        )
    tell(f"Pushed {model} to {commit_url}")


@dataclass(frozen=True)
class ImportState:
    """State of an import job, read from the database or over HTTP."""

    status: str
    stage: str
    percent: float
    is_claimed: bool
    error: str

    @classmethod
    def of_job(cls, job: "Job") -> "ImportState":
        percent, error = job.progress.get("percent", 0), (job.error or {}).get("message", "")
        return cls(job.status, job.stage or "", percent, job.attempt > 0, error)

    @classmethod
    def of_json(cls, job: Json) -> "ImportState":
        percent, error = job["progress"].get("percent", 0), (job["error"] or {}).get("message", "")
        return cls(job["status"], job["stage"] or "", percent, job["attempt"] > 0, error)


def follow_import(name: str, load: Callable[[], ImportState]) -> None:
    """Shows the progress of an import until it ends. Exits with status 1 if it did not succeed."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    began, stage, is_explained = time.monotonic(), "", False
    lines = ProgressLines(console)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("waiting for a worker", total=100)
        while (state := load()).status not in ENDED:
            if state.stage and state.stage != stage:
                stage = state.stage
                bar.update(task, description=escaped(stage))
                if not console.is_terminal:
                    tell(f"{name}: {stage}")
            bar.update(task, completed=state.percent)
            lines.tell(f"{name}: {stage or 'waiting for a worker'}  {state.percent:.0f}%")
            is_late = time.monotonic() - began > PATIENCE_SECONDS
            if not state.is_claimed and not is_explained and is_late:
                is_explained = True
                note(
                    "No train worker has taken the job yet. Check that `stillhouse up` or a train worker is running."
                )
            time.sleep(POLL_SECONDS)
        is_done = state.status == "succeeded"
        bar.update(task, completed=100 if is_done else state.percent)
    if not is_done:
        fail(state.error or f"the import was {state.status}")
    tell(f"Imported {name}")
