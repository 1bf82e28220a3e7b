"""Routes of registered models: list, read and delete."""

from typing import Annotated

from fastapi import APIRouter, Depends

from app.api.deps import Principal, require
from app.api.strict_route import StrictRoute
from app.db import models as model_rows
from app.db.session import transaction
from app.schemas.files import Deleted
from app.schemas.models import CheckpointModel, ModelList, ModelObject
from app.services import model_registry
from app.services.models import deletion

router = APIRouter(route_class=StrictRoute, prefix="/v1/models", tags=["models"])
Reader = Annotated[Principal, Depends(require("models:read"))]
Writer = Annotated[Principal, Depends(require("models:write"))]


@router.get("")
def list_models(principal: Reader) -> ModelList:
    """Lists all models that the project may use, including those shared by all projects."""
    with transaction() as session:
        aliases = model_rows.aliases_of_models(session, principal.project_id)
        rows = model_rows.list_models(session, principal.project_id)
        return ModelList(data=[ModelObject.of(row, aliases.get(row.id, [])) for row in rows])


@router.get("/{model_id}")
def get_model(model_id: str, principal: Reader) -> ModelObject | CheckpointModel:
    """Returns a model version, the one that an alias points at, or a checkpoint."""
    with transaction() as session:
        owner = principal.project_id
        if base_and_checkpoint := model_registry.find_checkpoint(session, owner, model_id):
            base_id, checkpoint = base_and_checkpoint
            return CheckpointModel.of(checkpoint, model_id=base_id, project_id=owner)
        row = model_registry.get_model(session, principal.project_id, model_id)
        return ModelObject.of(
            row, model_rows.aliases_of_models(session, principal.project_id).get(row.id, [])
        )


@router.delete("/{model_id}")
def delete_model(model_id: str, principal: Writer) -> Deleted:
    """Deletes a model. Refused with 409 while an alias, a pin, a job or a batch needs it.

    To delete a model that all projects share, the key needs the scope `admin`.
    """
    deletion.delete_model(principal, model_id)
    return Deleted(id=model_id, object="model")
