"""Origin of a model: its job, the files that the job read, and the models it descends from."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.schema.table import Json
from app.db.schema.tables import File, Job, Model
from app.model_card import Ancestor, DataFile

MAX_MODELS = 64  # that are visited; a longer lineage is cut
ROLES = ("training", "validation", "test")


@dataclass(frozen=True)
class Origin:
    """Origin of a model that a job made. `start` is the start model's id, None for an import."""

    teacher: str | None
    start: str | None
    files: tuple[DataFile, ...]
    ancestors: tuple[Ancestor, ...]


def origin_of(session: Session, job: Job) -> Origin:
    """Returns the origin of the model that a job has made or is about to register.

    Ancestors are the imported models at the ends of the lineage. Deleted models are left out.
    """
    block = job.spec.get("distillation")
    teacher = block.get("teacher") if isinstance(block, dict) else None
    if job.spec.get("method") == "supervised":
        teacher = None
    start = job.request.get("model")
    return Origin(
        teacher=teacher if isinstance(teacher, str) else None,
        start=start if isinstance(start, str) else None,
        files=tuple(_files(session, job)),
        ancestors=tuple(_ancestors(session, job)),
    )


def source_of(evaluation: Json | None) -> tuple[str | None, str | None]:
    """Returns the source on a hub and the licence of an imported model, from its result."""
    source = (evaluation or {}).get("source")
    if not isinstance(source, dict):
        return None, None
    hub, commit, license_ = source.get("hub"), source.get("commit"), source.get("license")
    name = str(hub).partition("@")[0]
    return f"hf:{name}@{commit}" if hub and commit else None, str(license_) if license_ else None


def _files(session: Session, job: Job) -> list[DataFile]:
    ids = (job.training_file_id, job.validation_file_id, job.test_file_id)
    files = []
    for role, file_id in zip(ROLES, ids, strict=True):
        ref = job.spec.get(f"{role}_file")
        row = session.get(File, file_id) if file_id is not None else None
        sha256 = ref.get("sha256") if isinstance(ref, dict) else None
        if sha256 is not None or row is not None:
            num_rows = row.num_rows if row is not None else None
            digest = sha256 or (row.sha256 if row is not None else "")
            files.append(DataFile(role, num_rows, digest))
    return files


def _ancestors(session: Session, job: Job) -> list[Ancestor]:
    keys, seen, ancestors = _parent_keys(job), set[str](), dict[str, Ancestor]()
    while keys and len(seen) < MAX_MODELS:
        key = keys.pop()
        model = session.scalars(_model_at(key)).one_or_none()
        if model is None or model.id in seen:
            continue
        seen.add(model.id)
        maker = session.get(Job, model.source_job_id) if model.source_job_id else None
        parents = _parent_keys(maker) if maker is not None else []
        keys += parents
        if not parents:
            source, license_ = source_of(model.evaluation)
            ancestors[model.id] = Ancestor(model.id, source, license_)
    return [ancestors[model_id] for model_id in sorted(ancestors)]


def _parent_keys(job: Job) -> list[str]:
    refs = (job.spec.get("teacher"), job.spec.get("start"))
    return [str(ref["key"]) for ref in refs if isinstance(ref, dict) and "key" in ref]


def _model_at(key: str) -> Any:  # Any: a Select of Model
    is_checkpoint = key.startswith("checkpoints/")
    owner = Model.source_job_id == key.split("/")[1] if is_checkpoint else Model.store_key == key
    return select(Model).where(owner).limit(1)
