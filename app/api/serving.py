"""/v1/models/{id}/…: how a model is served, and whether serve workers have it loaded."""

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


def switchboard(request: Request) -> RequestRouter:
    request_router: RequestRouter = request.app.state.switchboard
    return request_router


Board = Annotated[RequestRouter, Depends(switchboard)]


@router.get("/serving")
def get_serving(model_id: str, principal: Reader) -> ServingObject:
    with transaction() as session:
        row = model_registry.get_model(session, principal.project_id, model_id)
        options = Serving.of(model_registry.options_of(row))
        return ServingObject(model=row.id, **options.model_dump())


@router.put("/serving")
def set_serving(model_id: str, asked: SetServing, principal: Writer) -> ServingObject:
    """Sets all options; requests from now on are served that way, those under way as they began."""
    row = model_serving.set_options(principal, model_id, asked)
    return ServingObject(model=row.id, **Serving.of(model_registry.options_of(row)).model_dump())


@router.get("/status")
def get_status(model_id: str, principal: Reader, request_router: Board) -> ModelStatus:
    with transaction() as session:
        served = model_registry.resolve(session, principal.project_id, model_id).served
    return model_serving.status_of(
        served, request_router.workers
    )  # after the transaction: it has one of its own


@router.post("/load", status_code=202)
async def load_model(model_id: str, principal: Writer, request_router: Board) -> ModelStatus:
    """Begins to load on every serve worker that can serve it, and goes on whether or not anyone waits."""
    served = await run_in_threadpool(model_serving.to_load, principal, model_id)
    told = await request_router.tell(Load(served=served), engine=served.serving.engine)
    return await run_in_threadpool(model_serving.status_of, served, request_router.workers, told)


@router.post("/unload", status_code=202)
async def unload_model(model_id: str, principal: Writer, request_router: Board) -> ModelStatus:
    """Gives the memory back when the answers under way are written; the next request loads the model again."""
    served = await run_in_threadpool(model_serving.to_unload, principal, model_id)
    await request_router.tell(Unload(residence=served.residence))
    return await run_in_threadpool(model_serving.status_of, served, request_router.workers)


@router.post("/pin", status_code=202)
async def pin_model(model_id: str, principal: Operator, request_router: Board) -> ModelStatus:
    """Keeps the model, or whatever the alias points at, loaded on every serve worker."""
    served = await run_in_threadpool(model_serving.pin, principal, model_id)
    if request_router.workers:
        await tell_pins(request_router)
    told = [
        worker.worker_id
        for worker in request_router.workers
        if served.serving.engine in worker.engines
    ]
    return await run_in_threadpool(model_serving.status_of, served, request_router.workers, told)


@router.post("/unpin", status_code=202)
async def unpin_model(model_id: str, principal: Operator, request_router: Board) -> ModelStatus:
    """Lets the model make room for others again."""
    served = await run_in_threadpool(model_serving.unpin, principal, model_id)
    if request_router.workers:
        await tell_pins(request_router)
    return await run_in_threadpool(model_serving.status_of, served, request_router.workers)
