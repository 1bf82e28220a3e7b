"""Creates, moves, rolls back and deletes aliases, and pages through their history."""

import re

from app.auth import Principal
from app.db import models
from app.db.pagination import Order
from app.db.registry import aliases
from app.db.registry.batch_models import users_of_alias
from app.db.schema.registry_tables import AliasChange
from app.db.schema.tables import Alias
from app.db.session import Session, transaction
from app.errors import BadRequest, Conflict, NotFound
from app.services import model_registry

LABEL_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def set_alias(
    principal: Principal, name: str, alias: str, *, model_id: str, expected: str | None = None
) -> Alias:
    """Points `name@alias` at a model that the caller sees.

    expected: The id of the model that the alias must point at before; None if it does not matter.

    Raises BadRequest, NotFound, or Conflict if the alias points at another model than `expected`.
    """
    for param, label in (("name", name), ("alias", alias)):
        if not LABEL_PATTERN.fullmatch(label):
            raise BadRequest(
                f"{param} has 1 to 64 of the characters A-Z a-z 0-9 . _ - and begins with a letter or digit",
                param=param,
            )
    alias_id = f"{name}@{alias}"
    with transaction() as session:
        present = aliases.lock_alias(session, principal.project_id, alias_id)
        _demand_expected(alias_id, present, expected)
        target = model_registry.get_model(session, principal.project_id, model_id, lock=True)
        return aliases.point_alias(
            session,
            principal.project_id,
            alias_id,
            model_id=target.id,
            key_id=principal.key_id,
        )


def roll_back(principal: Principal, name: str, alias: str, *, expected: str | None) -> Alias:
    """Points `name@alias` at the model before the newest change. Restores a deleted alias.

    A second call undoes the first one. With `expected`, a repeated request is refused instead.

    Raises:
        NotFound: The alias never existed.
        Conflict: There is no earlier model, it was deleted, or the alias does not point at
            `expected`.
    """
    alias_id = f"{name}@{alias}"
    with transaction() as session:
        present = aliases.lock_alias(session, principal.project_id, alias_id)
        newest = aliases.newest_change(session, principal.project_id, alias_id)
        if present is None and newest is None:
            raise unknown(alias_id)
        _demand_expected(alias_id, present, expected)
        if newest is None or newest.from_model is None:
            raise Conflict(
                f"the alias {alias_id} has no earlier model; set it with PUT /v1/models/{name}/aliases/{alias}",
                "no_earlier_model",
                "alias",
            )
        try:
            target = model_registry.get_model(
                session, principal.project_id, newest.from_model, lock=True
            )
        except NotFound:
            raise Conflict(
                f"the earlier model {newest.from_model!r} of the alias {alias_id} has been deleted; point the alias at another model",
                "model_not_found",
                "alias",
            ) from None
        return aliases.point_alias(
            session,
            principal.project_id,
            alias_id,
            model_id=target.id,
            key_id=principal.key_id,
        )


def delete_alias(principal: Principal, name: str, alias: str) -> None:
    """Deletes an alias of the caller's project.

    Raises NotFound, and Conflict if a batch that has not ended uses the alias.
    """
    alias_id = f"{name}@{alias}"
    with transaction() as session:
        present = aliases.lock_alias(session, principal.project_id, alias_id)
        if present is None:
            raise unknown(alias_id)
        # Delete first: this waits for a transaction that is creating a batch with the alias.
        aliases.drop_alias(session, present, key_id=principal.key_id)
        users = users_of_alias(session, principal.project_id, alias_id)
        if users:
            raise Conflict(
                f"the alias {alias_id} is in use by {', '.join(users)}; wait for these batches to end, or cancel them",
                "resource_in_use",
                "alias",
            )


def get_alias(project_id: str, name: str, alias: str) -> Alias:
    """Returns an alias of the project. Raises NotFound."""
    with transaction() as session:
        row = models.find_alias(session, project_id, f"{name}@{alias}")
    if row is None:
        raise unknown(f"{name}@{alias}")
    return row


def page_history(
    session: Session, project_id: str, alias_id: str, *, after: str | None, limit: int, order: Order
) -> tuple[list[AliasChange], bool]:
    """Returns a page of the changes of an alias, and whether more follow.

    The history remains when the alias is deleted. Raises NotFound if there never was such an alias.
    """
    if (
        aliases.newest_change(session, project_id, alias_id) is None
        and models.find_alias(session, project_id, alias_id) is None
    ):
        raise unknown(alias_id)
    return aliases.page_changes(
        session,
        project_id,
        alias_id,
        after=after,
        limit=limit,
        order=order,
    )


def unknown(alias_id: str) -> NotFound:
    """Returns the error for an alias that does not exist."""
    return NotFound(f"the alias {alias_id} does not exist", "model_not_found", "alias")


def _demand_expected(alias_id: str, present: Alias | None, expected: str | None) -> None:
    if expected is None or (present is not None and present.model_id == expected):
        return
    state = f"points at {present.model_id!r}" if present is not None else "does not exist"
    raise Conflict(
        f"the alias {alias_id} {state}, but `from` is {expected!r}; read the alias again, then retry",
        "alias_moved",
        "from",
    )
