"""Deletes models that nothing needs any more."""

from app.auth import Principal
from app.db import models
from app.db.session import transaction
from app.errors import Conflict, Forbidden, NotFound
from app.storage import store


def delete_model(principal: Principal, model_id: str) -> None:
    """Deletes a model: first its row, then its bytes. Only an admin key deletes a shared model.

    Raises:
        NotFound: The project sees no such model.
        Forbidden: The model is shared by all projects, and the key lacks the scope `admin`.
        Conflict: An alias, a pin, a job, a batch or another model needs it.
    """
    with transaction() as session:
        row = models.find_model(session, principal.project_id, model_id)
        if row is None:
            raise NotFound(f"the model {model_id!r} does not exist", "model_not_found", "model")
        if row.project_id is None and "admin" not in principal.scopes:
            raise Forbidden(
                f"the model {model_id!r} is shared by all projects; to delete it, use a key with the scope 'admin'"
            )
        models.lock_model(session, row.id)  # prevents new users
        users = models.users_of_model(session, row)
        if users:
            raise Conflict(
                f"the model {model_id!r} is in use by {', '.join(users)}; end or remove these first",
                "resource_in_use",
                "model",
            )
        store_key = row.store_key
        if not models.delete_model(session, row.project_id, model_id):
            raise NotFound(f"the model {model_id!r} does not exist", "model_not_found", "model")
    store().delete(store_key)
