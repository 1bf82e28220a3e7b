"""Sizes of stored models, from the headers of their files."""

import json
from functools import lru_cache
from typing import Final

import structlog

from app.contracts.messages import ADAPTER_BASE, AdapterBase, ArtifactRef, ModelFacts
from app.contracts.model_sizes import ModelSizes, guess_model, measure_model, read_shapes
from app.storage import StorageError, store

log = structlog.get_logger(__name__)

# What reading the files of a damaged model raises: its config.json and headers may hold any JSON.
DAMAGED: Final = (
    OSError,
    StorageError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def stored_sizes(ref: ArtifactRef, facts: ModelFacts) -> ModelSizes:
    """Returns the sizes of a model. They are a guess, with its reason, if a file cannot be read."""
    try:
        return _read(ref.key, ref.sha256)
    except DAMAGED as fault:
        reason = "its config.json or the headers of its weights cannot be read"
        log.warning("model_sizes_guessed", key=ref.key, reason=f"{type(fault).__name__}: {fault}")
        return guess_model(facts, reason)


@lru_cache(maxsize=64)
def _read(key: str, sha256: str | None) -> ModelSizes:
    """Reads the headers. A stored folder never changes, so the result is kept.

    A checkpoint with adapters has the sizes of their start model.
    """
    files = store()
    names = files.children(key)
    if ADAPTER_BASE in names:
        with files.open(f"{key}/{ADAPTER_BASE}") as file:
            start = AdapterBase.model_validate_json(file.read()).start
        if start is None:
            raise ValueError("the adapters do not name their start model")
        return _read(start.key, start.sha256)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name.endswith(".safetensors"):
            with files.open(f"{key}/{name}") as file:
                shapes |= read_shapes(file)
    with files.open(f"{key}/config.json") as file:
        config = json.load(file)
    return measure_model(shapes, config)
