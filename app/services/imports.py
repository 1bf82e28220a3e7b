"""Imports that an operator starts on the machine of the service.

Local files are first copied (staged) into the store. An import job then converts them.
"""

import re
import secrets
from pathlib import Path
from typing import Literal

from app.contracts.messages import ArtifactRef, ImportJob
from app.contracts.model_files import ARCHIVE
from app.db import jobs
from app.db.schema.tables import Job
from app.db.session import transaction
from app.errors import BadRequest
from app.routing import task_queue
from app.services.jobs import demand_free_name
from app.settings import get_settings
from app.storage import StorageError, store

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
HUB = re.compile(r"hf:(?P<source>[\w.-]+/[\w.-]+(@[\w./-]+)?)", re.ASCII)
COPIES = 3  # on disk at the same time: staged, converted, stored


def import_model(source: str, name: str, *, project_id: str | None = None) -> str:
    """Queues the import of a folder, a file or hf:org/name@revision. Returns the job's id.

    A file is a .gguf file, or a tar or zip file with the files of a folder.

    If `project_id` is None, all projects see the model. Raises BadRequest, and Conflict if the name
    is taken.
    """
    if not NAME.fullmatch(name):
        raise BadRequest(
            "a name has 1 to 64 of the characters a-z 0-9 . _ - and begins with a letter or digit",
            param="name",
        )
    with transaction() as session:
        demand_free_name(session, name)
    job_id = f"import-{secrets.token_hex(12)}"
    spec = _spec(source, name, job_id)
    with transaction() as session:
        jobs.insert_job(
            session,
            id=job_id,
            project_id=project_id,
            kind="import",
            spec=spec.model_dump(mode="json"),
            request={"source": Path(source).name if spec.staged else source, "name": name},
            model_id=name,
        )
    task_queue.notify_workers()
    return job_id


def load_import(job_id: str) -> Job:
    """Returns an import job, which must exist."""
    with transaction() as session:
        job = jobs.load_job(session, job_id)
    assert job is not None
    return job


def _spec(source: str, name: str, job_id: str) -> ImportJob:
    if source.startswith("hf:"):
        match = HUB.fullmatch(source)
        if match is None or ".." in source:
            raise BadRequest(
                f"{source!r} is not a model on a hub; use the form hf:org/name@revision",
                param="source",
            )
        hub = match["source"]
        hub = hub if "@" in hub else f"{hub}@main"
        return ImportJob(output_model=name, hub=hub, uses_hub_token=True, format="hub")
    path = Path(source)
    if path.is_dir():
        return ImportJob(output_model=name, staged=_stage_folder(path, job_id), format="folder")
    if path.is_file() and (path.suffix == ".gguf" or ARCHIVE.fullmatch(path.name)):
        _demand_room(path.stat().st_size)
        file_name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name)
        staged = store().put_file(path, f"imports/{job_id}/model-{file_name}")
        kind: Literal["gguf", "archive"] = "gguf" if path.suffix == ".gguf" else "archive"
        return ImportJob(output_model=name, staged=staged, format=kind)
    raise BadRequest(
        f"{source!r} is not a model: give a folder with config.json and safetensors, a .gguf file, "
        "a tar or zip file of such a folder, or hf:org/name@revision",
        param="source",
    )


def _stage_folder(path: Path, job_id: str) -> ArtifactRef:
    if not (path / "config.json").is_file():
        raise BadRequest(
            f"{path} has no config.json; give a folder that save_pretrained wrote",
            param="source",
        )
    _demand_room(sum(file.stat().st_size for file in path.iterdir() if file.is_file()))
    try:
        return store().put_folder(path, f"imports/{job_id}")
    except StorageError as error:
        raise BadRequest(f"{path} cannot be imported: {error}", param="source") from error


def _demand_room(num_bytes: int) -> None:
    free, reserve = store().free_bytes(), get_settings().min_free_bytes
    if free is not None and free < COPIES * num_bytes + reserve:
        raise BadRequest(
            f"the store has {free / 1e9:.1f} GB left; the import needs {(COPIES * num_bytes + reserve) / 1e9:.1f} GB",
            "disk_full",
            "source",
        )
