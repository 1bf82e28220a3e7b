"""Route of /v1/workers: the state of the serve workers and of the running jobs."""

from typing import Annotated

from fastapi import APIRouter, Depends

from app.api.deps import Principal, require
from app.api.serving import Router
from app.api.strict_route import StrictRoute
from app.schemas.operations.workers import WorkersObject
from app.services.operations import workers

router = APIRouter(route_class=StrictRoute, tags=["workers"])


@router.get("/v1/workers")
def get_workers(
    principal: Annotated[Principal, Depends(require("models:read"))], request_router: Router
) -> WorkersObject:
    """Returns the serve workers that are alive, and the running jobs with their leases.

    Serve workers and the number of running jobs cover all projects. Models and jobs of other
    projects are not named, unless the key has the scope `admin`. Keys without the scope
    `jobs:read` see no jobs.
    """
    return workers.describe(principal, request_router.workers)
