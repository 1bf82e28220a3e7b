"""Loads of all engines of a worker by model, for the heartbeat."""

from collections import Counter
from collections.abc import Iterable

from app.contracts.control import EngineLoad
from app.contracts.generation import GenerateRequest
from worker.serve.host.model_cache import Resident


def engine_loads(
    residents: Iterable[Resident], parked: Iterable[GenerateRequest]
) -> tuple[EngineLoad, ...]:
    """Returns one load per model.

    `parked` are requests that no engine has yet. A model has several engines if it is loaded with
    different serving options. Their numbers are added, and the fullest KV cache counts.
    """
    loads: dict[str, EngineLoad] = {}
    for resident in residents:
        engine, model = resident.engine, resident.served.model
        caches = engine.cache_status()
        known = loads.get(model)
        load = EngineLoad(
            model=model,
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            kv_cache_usage=caches.usage,
            num_prefix_queries=caches.num_prefix_queries,
            num_prefix_hits=caches.num_prefix_hits,
        )
        loads[model] = load if known is None else _sum(known, load)
    for model, num_parked in Counter(request.model for request in parked).items():
        waiting = EngineLoad(model=model, num_waiting=num_parked)
        known = loads.get(model)
        loads[model] = waiting if known is None else _sum(known, waiting)
    return tuple(loads.values())


def _sum(one: EngineLoad, other: EngineLoad) -> EngineLoad:
    return EngineLoad(
        model=one.model,
        num_running=one.num_running + other.num_running,
        num_waiting=one.num_waiting + other.num_waiting,
        kv_cache_usage=max(one.kv_cache_usage, other.kv_cache_usage),
        num_prefix_queries=one.num_prefix_queries + other.num_prefix_queries,
        num_prefix_hits=one.num_prefix_hits + other.num_prefix_hits,
    )
