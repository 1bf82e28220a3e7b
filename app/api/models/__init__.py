"""Routes of /v1/models."""

from fastapi import APIRouter

from app.api.models import aliases, files, imports, registry

router = APIRouter()
# Routes are matched in this order, so fixed paths come before `/{model_id}`.
for _module in (imports, files, aliases, registry):
    router.include_router(_module.router)
