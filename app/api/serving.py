"""Routes of /v1/models/{id}/...: serving options, and loading and pinning on serve workers."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool

from app.api.deps import Principal, require
from app.api.strict_route import StrictRoute
from app.contracts.control import Load, Unload
from app.db.session import transaction
from app.routing.router import RequestRouter
from app.schemas.serving import ModelStatus, Serving, ServingObject, SetServing
from app.services import model_registry, model_serving
from app.services.pin_broadcaster import tell_pins

router = APIRouter(route_class=StrictRoute, prefix="/v1/models/{model_id}", tags=["models"])
Reader = Annotated[Principal, Depends(require("models:read"))]
Writer = Annotated[Principal, Depends(require("models:write"))]
Operator = Annotated[Principal, Depends(require("admin"))]


def request_router(request: Request) -> RequestRouter:
    """Returns the request router of this process."""
    request_router: RequestRouter = request.app.state.request_router
    return request_router


Router = Annotated[RequestRouter, Depends(request_router)]


@router.get("/serving")
def get_serving(model_id: str, principal: Reader) -> ServingObject:
    """Returns the serving options of a model."""
    with transaction() as session:
        row = model_registry.get_model(session, principal.project_id, model_id)
        options = Serving.of(model_registry.options_of(row))
        return ServingObject(model=row.id, **options.model_dump())


@router.put("/serving")
def set_serving(model_id: str, asked: SetServing, principal: Writer) -> ServingObject:
    """Replaces all serving options of a model.

    New requests use the new options. Requests in progress end with the old ones.
    """
    row = model_serving.set_options(principal, model_id, asked)
    return ServingObject(model=row.id, **Serving.of(model_registry.options_of(row)).model_dump())


@router.get("/status")
def get_status(model_id: str, principal: Reader, request_router: Router) -> ModelStatus:
    """Returns the state of a model on each serve worker."""
    with transaction() as session:
        served = model_registry.resolve(session, principal.project_id, model_id).served
    # After the transaction, because it opens a transaction itself.
    return model_serving.status_of(served, request_router.workers)


@router.post("/load", status_code=202)
async def load_model(model_id: str, principal: Writer, request_router: Router) -> ModelStatus:
    """Starts loading a model on all serve workers that can serve it, and returns at once.

    Ask for the status to see the progress.
    """
    served = await run_in_threadpool(model_serving.to_load, principal, model_id)
    told = await request_router.tell(Load(served=served), engine=served.serving.engine)
    return await run_in_threadpool(model_serving.status_of, served, request_router.workers, told)


@router.post("/unload", status_code=202)
async def unload_model(model_id: str, principal: Writer, request_router: Router) -> ModelStatus:
    """Unloads a model from all serve workers once its answers in progress have ended.

    The next request loads the model again.
    """
    served = await run_in_threadpool(model_serving.to_unload, principal, model_id)
    await request_router.tell(Unload(serving_key=served.serving_key))
    return await run_in_threadpool(model_serving.status_of, served, request_router.workers)


@router.post("/pin", status_code=202)
async def pin_model(model_id: str, principal: Operator, request_router: Router) -> ModelStatus:
    """Keeps a model loaded on all serve workers that can serve it.

    A pinned alias follows its target. Needs the scope `admin`.
    """
    served = await run_in_threadpool(model_serving.pin, principal, model_id, request_router.workers)
    if request_router.workers:
        await tell_pins(request_router)
    told = [
        worker.worker_id
        for worker in request_router.workers
        if worker.can_serve(served.serving.engine)
    ]
    return await run_in_threadpool(model_serving.status_of, served, request_router.workers, told)


@router.post("/unpin", status_code=202)
async def unpin_model(model_id: str, principal: Operator, request_router: Router) -> ModelStatus:
    """Removes the pin of a model, which may then be evicted. Needs the scope `admin`."""
    served = await run_in_threadpool(model_serving.unpin, principal, model_id)
    if request_router.workers:
        await tell_pins(request_router)
    return await run_in_threadpool(model_serving.status_of, served, request_router.workers)
