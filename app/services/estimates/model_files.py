"""Sizes of stored models, from the headers of their files."""

import json
from functools import lru_cache

import structlog

from app.contracts.messages import ArtifactRef, ModelFacts
from app.contracts.model_sizes import ModelSizes, guess_model, measure_model, read_shapes
from app.storage import StorageError, store

log = structlog.get_logger(__name__)


def stored_sizes(ref: ArtifactRef, facts: ModelFacts) -> ModelSizes:
    """Returns the sizes of a model. They are approximate if its files cannot be read."""
    try:
        return _read(ref.key, ref.sha256)
    except (OSError, ValueError, KeyError, TypeError, StorageError) as fault:
        log.warning("model_sizes_guessed", key=ref.key, reason=type(fault).__name__)
        return guess_model(facts)


@lru_cache(maxsize=64)
def _read(key: str, sha256: str | None) -> ModelSizes:
    """Reads the headers. A stored folder never changes, so the result is kept."""
    files = store()
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files.children(key):
        if name.endswith(".safetensors"):
            with files.open(f"{key}/{name}") as file:
                shapes |= read_shapes(file)
    with files.open(f"{key}/config.json") as file:
        config = json.load(file)
    return measure_model(shapes, config)
