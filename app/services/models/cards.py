"""Model cards: the one stored with a model, or one made from its row if it has none."""

from app.contracts.messages import ModelFacts
from app.db.jobs import load_job
from app.db.registry.lineage import origin_of, source_of
from app.db.session import transaction
from app.errors import NotFound
from app.model_card import CARD, Ancestor, ModelCard
from app.services import model_registry
from app.services.models import files
from app.storage import store


def get_card(project_id: str, model_id: str) -> bytes:
    """Returns the model card in Markdown. Raises NotFound as `files.list_files` does.

    Models that an older version registered have no stored card. Theirs names no versions.
    """
    for file in files.list_files(project_id, model_id):
        if file.name == CARD and store().exists(file.store_key):
            return b"".join(file.read(range(file.size_bytes)))
    with transaction() as session:
        if model_registry.CHECKPOINT_PATTERN.fullmatch(model_id):
            raise NotFound(
                f"the checkpoint {model_id!r} has no model card; the model has one when its job has succeeded",
                param="model",
            )
        row = model_registry.get_model(session, project_id, model_id)
        job = load_job(session, row.source_job_id) if row.source_job_id is not None else None
        origin = origin_of(session, job) if job is not None else None
        ancestors = origin.ancestors if origin is not None else ()
        if row.origin == "imported":
            source, license_ = source_of(row.evaluation)
            ancestors = (Ancestor(row.id, source, license_),)
        card = ModelCard(
            model_id=row.id,
            facts=ModelFacts.model_validate(row.facts),
            made_on=row.created_at.date(),
            teacher=row.teacher_id,
            start=origin.start if origin is not None else row.base_id,
            result=row.evaluation or {},
            spec=job.spec if job is not None else {},
            files=origin.files if origin is not None else (),
            ancestors=ancestors,
            trained_tokens=job.trained_tokens if job is not None else None,
        )
    return card.render().encode()
