"""Serving options and pins of models, and their state on the serve workers."""

from collections.abc import Collection

from app.auth import Principal
from app.contracts.control import ModelState, ServedModel, ServeWorkerStatus
from app.contracts.generation import Draft, ServingOptions
from app.contracts.messages import ModelFacts
from app.db import models
from app.db.schema.tables import Model
from app.db.session import Session, transaction
from app.errors import BadRequest, Conflict, Forbidden, NotFound
from app.schemas.serving import LoadState, ModelStatus, SetServing, WorkerState
from app.services import model_registry
from app.settings import get_settings

STATES: tuple[LoadState, ...] = ("resident", "loading", "failed", "absent")


def set_options(principal: Principal, model_id: str, asked: SetServing) -> Model:
    """Sets the serving options of a model, which apply from the next request.

    Raises:
        BadRequest: The model does not support the options, or the draft does not fit.
        NotFound: The project sees no such model or draft.
        Forbidden: The model is shared, and the key lacks the scope `admin`.
    """
    with transaction() as session:
        row = model_registry.get_model(session, principal.project_id, model_id)
        _refuse_other_projects(principal, row)
        facts = ModelFacts.model_validate(row.facts)
        _refuse_mute(row.id, facts)
        if asked.engine == "vllm":
            _refuse_beside_vllm(asked, facts)
        draft = None
        if asked.draft is not None:
            drafter = _find_draft(session, principal.project_id, row, asked.draft.model)
            weights = model_registry.artifact(drafter)
            draft = Draft(model=drafter.id, weights=weights, num_tokens=asked.draft.num_tokens)
        options = ServingOptions(engine=asked.engine, weights=asked.weights, draft=draft)
        row.serving = None if options == ServingOptions() else options.model_dump(mode="json")
        return row


def _refuse_other_projects(principal: Principal, row: Model) -> None:
    if row.project_id is None and "admin" not in principal.scopes:
        message = f"the model {row.id!r} is shared by all projects; this needs a key with the scope 'admin'"
        raise Forbidden(message)


def _refuse_mute(model_id: str, facts: ModelFacts | None) -> None:
    if facts is not None and facts.family == "masked":
        message = f"{model_id!r} is a {facts.architecture} model, which does not generate text"
        raise BadRequest(message, "model_not_servable", "model")


def _refuse_beside_vllm(asked: SetServing, facts: ModelFacts) -> None:
    if facts.family != "causal":
        message = f"vLLM cannot serve {facts.architecture} models; use the engine transformers"
        raise BadRequest(message, "incompatible_options", "engine")
    if asked.weights not in ("auto", "plain"):
        message = "vLLM only serves the weights as stored; leave weights out, or use the engine transformers"
        raise BadRequest(message, "incompatible_options", "weights")


def _find_draft(session: Session, project_id: str, row: Model, draft_id: str) -> Model:
    """Returns the draft model, locked so that it cannot be deleted before the transaction ends.

    Raises NotFound, and BadRequest if it cannot be the draft of the model in `row`.
    """
    drafter = model_registry.get_model(
        session, project_id, draft_id, param="draft.model", lock=True
    )
    ours, theirs = ModelFacts.model_validate(row.facts), ModelFacts.model_validate(drafter.facts)
    reason = None
    if drafter.id == row.id:
        reason = "a model cannot be its own draft; choose a smaller one, such as its student"
    elif row.project_id is None and drafter.project_id is not None:
        reason = f"{row.id!r} is shared by all projects, so its draft must be shared, too"
    elif not ours.family == theirs.family == "causal":
        reason = f"model and draft must both be decoders; they are {ours.architecture} and {theirs.architecture}"
    elif (ours.tokenizer_sha256, ours.vocab_size) != (theirs.tokenizer_sha256, theirs.vocab_size):
        reason = f"{drafter.id!r} does not have the tokenizer of {row.id!r}; use a draft that has it, such as a student that kept it"
    if reason is not None:
        raise BadRequest(reason, "incompatible_draft", "draft.model")
    return drafter


def pinned(session: Session) -> tuple[ServedModel, ...]:
    """Returns the pinned models of all projects with their present serving options, each once."""
    found: dict[str, ServedModel] = {}
    for pin in models.list_pins(session):
        try:
            served = model_registry.resolve(session, pin.project_id, pin.id).served
        except NotFound:
            continue  # the model or alias was deleted
        found[served.serving_key] = served
    return tuple(found.values())


def all_pinned() -> tuple[ServedModel, ...]:
    """Like `pinned`, in a transaction of its own."""
    with transaction() as session:
        return pinned(session)


def pin(
    principal: Principal, target_id: str, workers: Collection[ServeWorkerStatus] = ()
) -> ServedModel:
    """Keeps a model loaded on every serve worker.

    A pinned alias stays pinned when it is moved to another model. The pinned models must fit the
    smallest of `workers`, and the setting if it is given.

    Raises:
        NotFound: The project sees no such model.
        BadRequest: The model cannot generate text.
        Conflict: A worker cannot hold all pinned models.
    """
    with transaction() as session:
        found = model_registry.resolve(session, principal.project_id, target_id, lock=True)
        _refuse_mute(target_id, found.facts)
        is_alias = models.find_alias(session, principal.project_id, target_id) is not None
        models.pin(session, principal.project_id, target_id if is_alias else found.model_id)
        num_bytes = sum(kept.stored_bytes for kept in pinned(session))
        limits = [worker.resident_bytes for worker in workers if worker.resident_bytes]
        limit = min([get_settings().resident_model_bytes or num_bytes, *limits])
        if num_bytes > limit:
            message = f"with this model, the pinned models have {num_bytes} bytes; a worker keeps at most {limit}; unpin another model first"
            raise Conflict(message, "pins_exceed_memory", "model")
        return found.served


def unpin(principal: Principal, target_id: str) -> ServedModel:
    """Removes a pin, so that the model may be unloaded unless another pin keeps it.

    Raises NotFound if the model does not exist.
    """
    with transaction() as session:
        served = model_registry.resolve(session, principal.project_id, target_id).served
        models.unpin(session, principal.project_id, target_id)
        return served


def to_load(principal: Principal, model_id: str) -> ServedModel:
    """Returns the weights and options that a worker loads for a model.

    Raises NotFound, and BadRequest for a model that cannot generate text.
    """
    with transaction() as session:
        found = model_registry.resolve(session, principal.project_id, model_id)
    _refuse_mute(model_id, found.facts)
    return found.served


def to_unload(principal: Principal, model_id: str) -> ServedModel:
    """Returns the weights and options that a worker unloads for a model.

    Raises NotFound, Forbidden if the model is shared, and Conflict if it is pinned.
    """
    with transaction() as session:
        found = model_registry.resolve(session, principal.project_id, model_id)
        row = models.find_model(session, principal.project_id, found.model_id)
        if row is not None:
            _refuse_other_projects(principal, row)
        if any(kept.serving_key == found.served.serving_key for kept in pinned(session)):
            raise Conflict(
                f"the model {model_id!r} is pinned; unpin it first", "model_pinned", "model"
            )
        return found.served


def status_of(
    served: ServedModel, workers: Collection[ServeWorkerStatus], just_told: Collection[str] = ()
) -> ModelStatus:
    """Returns the state of a model on each worker, and the best of these states.

    `just_told` are the ids of workers that were just told to load it. They are shown as loading
    until their heartbeats say so.
    """
    shown = []
    for worker in sorted(workers, key=lambda worker: worker.worker_id):
        state = next(
            (model for model in worker.models if model.serving_key == served.serving_key), None
        )
        if worker.worker_id in just_told and (state is None or state.state == "failed"):
            state = ModelState(
                serving_key=served.serving_key, state="loading", bytes=served.stored_bytes
            )
        shown.append(_worker_state(worker.worker_id, state))
    best = min((worker.state for worker in shown), key=STATES.index, default="absent")
    is_pinned = any(kept.serving_key == served.serving_key for kept in all_pinned())
    return ModelStatus(model=served.model, state=best, is_pinned=is_pinned, workers=shown)


def _worker_state(worker_id: str, state: ModelState | None) -> WorkerState:
    if state is None:
        return WorkerState(worker=worker_id, state="absent")
    first_token, accepted = state.first_token_seconds, state.acceptance_rate
    return WorkerState(
        worker=worker_id,
        state=state.state,
        bytes=state.bytes,
        percent=round(state.percent, 1),
        weights=state.weights,
        load_seconds=state.load_seconds,
        first_token_ms=None if first_token is None else round(1000 * first_token, 2),
        acceptance_rate=None if accepted is None else round(accepted, 3),
        error=state.error,
    )
