"""`stillhouse jobs`: creates, lists, watches and controls training jobs over HTTP."""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from app.commands.remote.connection import over_http
from app.commands.remote.job_body import JobOptions, Labels, job_body, pairs_of
from app.commands.remote.listing import After, All, Columns, Limit, Window, show_list
from app.commands.remote.output import confirm, show_json
from app.commands.shell import IsJson, Json, console, fail, messages, note, tell

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

JOBS: Final = "/v1/fine_tuning/jobs"
JobId = Annotated[str, typer.Argument(help="Id of the job: ftjob-…")]
TrainingFile = Annotated[
    str, typer.Option(metavar="PATH|ID", help="Rows to train on: a path, or a file's id.")
]
ValidationFile = Annotated[str | None, typer.Option(metavar="PATH|ID", help="Rows to evaluate on.")]
StartModel = Annotated[
    str | None, typer.Option(help="Model the student starts from; default: the teacher.")
]
Teacher = Annotated[
    str | None, typer.Option(help="Model to learn from; default: the model itself.")
]
Layers = Annotated[
    str | None,
    typer.Option(metavar="N[,N...]", help="Layers to keep; several numbers make a ladder."),
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the rows.")]
Suffix = Annotated[str | None, typer.Option(help="Part of the student's name.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the run.")]
IsSupervised = Annotated[
    bool, typer.Option("--supervised", help="Train on the answers in the rows, without a teacher.")
]
MethodJson = Annotated[
    str | None,
    typer.Option(metavar="JSON|@FILE", help="Further options of the method, see docs/jobs.md."),
]
IsWatched = Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")]

jobs = typer.Typer(no_args_is_help=True, help="Training jobs.")


@jobs.command("create")
@over_http
def create_job(
    service: "RemoteService",
    training_file: TrainingFile,
    model: StartModel = None,
    teacher: Teacher = None,
    validation_file: ValidationFile = None,
    layers: Layers = None,
    epochs: Epochs = None,
    suffix: Suffix = None,
    seed: Seed = None,
    metadata: Labels = None,
    is_supervised: IsSupervised = False,
    method_json: MethodJson = None,
    is_watched: IsWatched = False,
    is_json: IsJson = False,
) -> None:
    """Creates a job and prints its id. Files that are given as paths are uploaded first."""
    from app.commands.remote.transfers import file_id_of

    body = job_body(
        JobOptions(
            model=model,
            teacher=teacher,
            suffix=suffix,
            layers=layers,
            epochs=epochs,
            seed=seed,
            metadata=metadata or (),
            is_supervised=is_supervised,
            method_json=method_json,
        )
    )
    for name, path in (("training_file", training_file), ("validation_file", validation_file)):
        if path is not None:
            body[name] = file_id_of(service, path, "fine-tune")
    job = service.create(JOBS, body)
    if is_watched:
        note(f"Created {job['id']}")
        follow(service, job["id"], is_json=is_json)
    elif is_json:
        show_json(job)
    else:
        print(job["id"])
        if messages.is_terminal:
            note(f"Follow it: stillhouse jobs watch {job['id']}")


@jobs.command("list")
@over_http
def list_jobs(
    service: "RemoteService",
    metadata: Labels = None,
    limit: Limit = 20,
    after: After = None,
    is_all: All = False,
    is_json: IsJson = False,
) -> None:
    """Lists jobs, newest first."""
    from app.commands.remote.job_report import HEADINGS, job_row

    query = {f"metadata[{key}]": value for key, value in pairs_of(metadata or ()).items()}
    window = Window(limit, after, is_all, is_json)
    show_list(service, JOBS, window, Columns(HEADINGS, job_row), query)


@jobs.command("show")
@over_http
def show_one_job(service: "RemoteService", job_id: JobId, is_json: IsJson = False) -> None:
    """Shows a job with its progress and its result."""
    from app.commands.remote.job_report import show_job

    job = service.get(path_of(job_id))
    if is_json:
        show_json(job)
    else:
        show_job(job)


@jobs.command("watch")
@over_http
def watch(service: "RemoteService", job_id: JobId, is_json: IsJson = False) -> None:
    """Follows a job to its end. Ctrl-C ends the command only; the job goes on.

    The exit status is 0 if the job succeeded, 1 if it failed, was cancelled or is paused, and 130
    after Ctrl-C.
    """
    follow(service, job_id, is_json=is_json)


@jobs.command("events")
@over_http
def show_events(
    service: "RemoteService",
    job_id: JobId,
    is_followed: Annotated[
        bool, typer.Option("--follow", "-f", help="Print events as they happen, until the end.")
    ] = False,
    limit: Limit = 20,
    after: After = None,
    is_all: All = False,
    is_json: IsJson = False,
) -> None:
    """Prints the newest events of a job, oldest first."""
    from app.commands.remote.job_events import follow_events, print_events

    if is_followed:
        follow_events(service, path_of(job_id), is_json=is_json)
        return
    print_events(service, path_of(job_id), Window(limit, after, is_all, is_json))


@jobs.command("pause")
@over_http
def pause_job(service: "RemoteService", job_id: JobId, is_json: IsJson = False) -> None:
    """Pauses a job. A running job stops at its next checkpoint."""
    change(service, job_id, "pause", is_json=is_json)


@jobs.command("resume")
@over_http
def resume_job(service: "RemoteService", job_id: JobId, is_json: IsJson = False) -> None:
    """Resumes a paused job, or a failed job that has a checkpoint."""
    change(service, job_id, "resume", is_json=is_json)


@jobs.command("cancel")
@over_http
def cancel_job(service: "RemoteService", job_id: JobId, is_json: IsJson = False) -> None:
    """Cancels a job."""
    change(service, job_id, "cancel", is_json=is_json)


@jobs.command("delete")
@over_http
def delete_job(
    service: "RemoteService",
    job_id: JobId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    is_json: IsJson = False,
) -> None:
    """Deletes a job that has ended, with its history and its checkpoints."""
    confirm(f"Delete the job {job_id} with its events and checkpoints?", is_confirmed=yes)
    deleted = service.delete(path_of(job_id))
    if is_json:
        show_json(deleted)
    else:
        tell(f"Deleted {job_id}")


def path_of(job_id: str, *parts: str) -> str:
    """Returns the path of a job's route."""
    from app.commands.remote_service import object_path

    return object_path(JOBS, job_id, *parts)


def change(service: "RemoteService", job_id: str, action: str, *, is_json: bool) -> None:
    """Pauses, resumes or cancels a job, and prints its status."""
    job = service.post(path_of(job_id, action))
    if is_json:
        show_json(job)
        return
    is_requested = job.get(f"{action}_requested_at") is not None
    is_pending = is_requested and job["status"] in ("queued", "running")
    tell(f"{job_id} is {job['status']}{f'; the {action} is requested' if is_pending else ''}")


def follow(service: "RemoteService", job_id: str, *, is_json: bool) -> None:
    """Shows a job's progress until it ends, and then the job. Exits with 1 unless it succeeded."""
    from app.commands.remote.job_progress import watch_job
    from app.commands.remote.job_report import show_job

    path = path_of(job_id)
    service.get(path)  # a wrong id or key is an error before the progress bar starts
    try:
        job = watch_job(lambda: service.get_patiently(path), messages if is_json else console)
    except KeyboardInterrupt:
        note(f"The job goes on. Follow it again: stillhouse jobs watch {job_id}")
        note(f"To stop it: stillhouse jobs cancel {job_id}")
        raise typer.Exit(130) from None
    if is_json:
        show_json(job)
    else:
        show_job(job)
    if job["status"] != "succeeded":
        fail(reason_of(job))


def reason_of(job: Json) -> str:
    """Returns why a job has not succeeded, and what to do about it."""
    if job["status"] == "paused":
        reason = f" ({job['pause_reason']})" if job["pause_reason"] else ""
        return f"the job is paused{reason}; continue it: stillhouse jobs resume {job['id']}"
    if job["status"] == "cancelled":
        return "the job was cancelled"
    return f"the job failed: {job['error']['message']}"
