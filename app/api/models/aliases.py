"""Routes of aliases and their history."""

from typing import Annotated

from fastapi import APIRouter, Depends

from app.api.deps import AskedPage, Principal, require
from app.api.strict_route import StrictRoute
from app.db.session import transaction
from app.schemas.aliases import AliasChangeObject, AliasObject, RollBack, SetAlias
from app.schemas.files import Deleted
from app.schemas.listing import Listing, ends
from app.services.models import aliases

router = APIRouter(route_class=StrictRoute, prefix="/v1/models", tags=["models"])
Reader = Annotated[Principal, Depends(require("models:read"))]
Writer = Annotated[Principal, Depends(require("models:write"))]


@router.get("/{name}/aliases/{alias}")
def get_alias(name: str, alias: str, principal: Reader) -> AliasObject:
    """Returns the alias `{name}@{alias}` with the model that it points at."""
    return AliasObject.of(aliases.get_alias(principal.project_id, name, alias))


@router.put("/{name}/aliases/{alias}")
def set_alias(name: str, alias: str, asked: SetAlias, principal: Writer) -> AliasObject:
    """Points the alias `{name}@{alias}` at a model. New requests for the alias use this model.

    With `from`, the request is refused with 409 if the alias points at another model.
    """
    row = aliases.set_alias(principal, name, alias, model_id=asked.model, expected=asked.expected)
    return AliasObject.of(row)


@router.delete("/{name}/aliases/{alias}")
def delete_alias(name: str, alias: str, principal: Writer) -> Deleted:
    """Deletes the alias `{name}@{alias}`. The model and the history remain."""
    aliases.delete_alias(principal, name, alias)
    return Deleted(id=f"{name}@{alias}", object="model.alias")


@router.post("/{name}/aliases/{alias}/rollback")
def roll_back_alias(
    name: str, alias: str, principal: Writer, asked: RollBack | None = None
) -> AliasObject:
    """Points the alias at the model before its newest change, and restores a deleted alias.

    A second rollback undoes the first one. To make retries safe, send the model that the alias
    points at now as `from`.
    """
    expected = asked.expected if asked is not None else None
    return AliasObject.of(aliases.roll_back(principal, name, alias, expected=expected))


@router.get("/{name}/aliases/{alias}/history")
def list_alias_history(
    name: str, alias: str, principal: Reader, page: AskedPage
) -> Listing[AliasChangeObject]:
    """Lists the changes of the alias, newest first by default."""
    with transaction() as session:
        rows, has_more = aliases.page_history(
            session,
            principal.project_id,
            f"{name}@{alias}",
            after=page.after,
            limit=page.limit,
            order=page.order,
        )
        data = [AliasChangeObject.of(row) for row in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)
