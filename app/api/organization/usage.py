"""Route of the usage report, which has the form of OpenAI's."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from app.api.deps import Principal, known_query, require
from app.api.strict_route import StrictRoute
from app.db.usage.report import UsageFilter
from app.errors import BadRequest, Forbidden
from app.schemas.organization.usage import UsagePage
from app.services.usage.report import BucketWidth, UsageQuery, report_usage

router = APIRouter(route_class=StrictRoute, prefix="/v1/organization", tags=["usage"])
Reader = Annotated[Principal, Depends(require("inference"))]
Seconds = Annotated[int, Query(ge=0, le=2**33, description="In seconds since the epoch")]
Values = Annotated[list[Annotated[str, Query(max_length=200)]] | None, Query(max_length=100)]
LISTS = ("project_ids", "user_ids", "api_key_ids", "models", "group_by")
# The openai client writes the names of lists with brackets, and other clients may leave them out.
BRACKETS = {f"{name}[]": rf"{name}\[\]" for name in LISTS}


def usage_lists(
    request: Request,
    project_ids: Values = None,
    user_ids: Values = None,
    api_key_ids: Values = None,
    models: Values = None,
    group_by: Values = None,
) -> dict[str, list[str] | None]:
    """Returns the values of each list, or None for a list that is not given."""
    given = (project_ids, user_ids, api_key_ids, models, group_by)
    lists: dict[str, list[str] | None] = {}
    for name, values in zip(LISTS, given, strict=True):
        in_brackets = request.query_params.getlist(f"{name}[]")
        lists[name] = [*(values or ()), *in_brackets] if values or in_brackets else None
        if len(in_brackets) > 100 or any(len(value) > 200 for value in in_brackets):
            message = f"{name} may have at most 100 values of at most 200 characters"
            raise BadRequest(message, param=name)
    return lists


@router.get("/usage/completions", dependencies=[Depends(known_query(BRACKETS))])
def get_completions_usage(
    caller: Reader,
    lists: Annotated[dict[str, list[str] | None], Depends(usage_lists)],
    start_time: Seconds,
    end_time: Seconds | None = None,
    bucket_width: BucketWidth = "1d",
    batch: bool | None = None,
    limit: int | None = None,
    page: Annotated[str | None, Query(max_length=64)] = None,
) -> UsagePage:
    """Reports the tokens and requests of all projects in buckets of time.

    A key without the scope `admin` gets the report of its own project.
    """
    project_ids = lists["project_ids"]
    if not caller.has("admin"):
        if any(project_id != caller.project_id for project_id in project_ids or ()):
            raise Forbidden(
                "only a key with the scope 'admin' can read the usage of other projects"
            )
        project_ids = [caller.project_id]
    if lists["user_ids"] is not None:
        project_ids = []  # there are no users, so a filter of users selects nothing
    return report_usage(
        UsageQuery(
            start_time,
            end_time,
            bucket_width,
            limit,
            page,
            lists["group_by"] or (),
            UsageFilter(project_ids, lists["api_key_ids"], lists["models"], batch),
        )
    )
