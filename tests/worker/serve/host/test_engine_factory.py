"""Making engines: how far a load has come is known while it goes on."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.contracts.control import ServedModel
from app.contracts.generation import Draft, ServingOptions
from app.contracts.messages import ArtifactRef
from worker.cpu.linear_ops import HAS_FAST_BFLOAT16
from worker.serve.decoding.cursor_batch import Steps
from worker.serve.engine import TransformersEngine
from worker.serve.host.engine_factory import (
    READ_PERCENT,
    EngineLimits,
    LoadProgress,
    Ready,
    make_ready,
    prefers_vllm,
    watch_loads,
)
from worker.serve.speculative import SpeculativeEngine
from worker.serve.vllm_core import has_vllm

LIMITS = EngineLimits(max_running=4, max_context_tokens=64, device="cpu", clock=time.time)


class Watched(LoadProgress):
    """Notes the progress at each of transformers' steps."""

    def counted(self, things: Iterable[Any], total: int) -> Iterator[Any]:
        self.seen: list[float] = []
        for thing in super().counted(things, total):
            self.seen.append(self.percent)
            yield thing


def ready(folder: Path, limits: EngineLimits = LIMITS, **options: Any) -> Ready:
    """A tiny model, served with the options."""
    weights = ArtifactRef(key="models/tiny", bytes=1000)
    served = ServedModel(model="tiny", weights=weights, serving=ServingOptions(**options))
    return make_ready(served, lambda ref: folder, limits, LoadProgress(served.stored_bytes))


def test_each_option_has_its_engine_and_its_bytes(tiny_llama_dir: Path) -> None:
    plain = ready(tiny_llama_dir)
    small = ready(tiny_llama_dir, weights="int8")
    draft = Draft(model="student", weights=ArtifactRef(key="models/student", bytes=500))
    drafted = ready(tiny_llama_dir, draft=draft)
    assert small.num_bytes < plain.num_bytes < drafted.num_bytes == 2 * plain.num_bytes
    assert isinstance(drafted.engine, SpeculativeEngine)
    assert all(made.first_token_seconds is not None for made in (plain, small, drafted))


def test_the_limits_say_how_engines_decode(tiny_gpt2_dir: Path) -> None:
    every: tuple[Steps, ...] = ("plain", "static")
    for steps in every:
        made = ready(tiny_gpt2_dir, replace(LIMITS, steps=steps)).engine
        assert isinstance(made, TransformersEngine)
        assert (made.steps, made._decoder.batch.static is not None) == (steps, steps == "static")


def test_weights_left_to_us_are_rounded_where_that_is_fast_and_changes_no_promise(
    tiny_llama_dir: Path,
) -> None:
    limits = replace(LIMITS, precision="auto")
    plain, left = ready(tiny_llama_dir, limits, weights="plain"), ready(tiny_llama_dir, limits)
    assert (plain.weights, left.weights) == ("plain", "bfloat16" if HAS_FAST_BFLOAT16 else "plain")
    assert (left.num_bytes < plain.num_bytes) == HAS_FAST_BFLOAT16
    draft = Draft(model="student", weights=ArtifactRef(key="models/student", bytes=500))
    assert ready(tiny_llama_dir, limits, draft=draft).weights == "plain"
    assert ready(tiny_llama_dir, limits, weights="int8").weights == "int8"
    assert ready(tiny_llama_dir).weights == "plain"  # the worker was told float32
    assert replace(limits, device="cuda").weights_for(ServingOptions()) == "plain"


def test_progress_follows_the_reading_of_the_weights(tiny_llama_dir: Path) -> None:
    served = ServedModel(model="tiny", weights=ArtifactRef(key="models/tiny", bytes=1000))
    progress = Watched(served.stored_bytes)
    watch_loads()
    made = make_ready(served, lambda ref: tiny_llama_dir, LIMITS, progress)
    assert len(progress.seen) > 10
    assert progress.seen == sorted(set(progress.seen))
    assert progress.seen[-1] < progress.percent == READ_PERCENT
    assert made.first_token_seconds is not None
    assert not made.engine.has_work()


def test_auto_is_our_engine_on_a_cpu(tiny_llama_dir: Path) -> None:
    assert isinstance(ready(tiny_llama_dir, engine="auto").engine, TransformersEngine)


@pytest.mark.skipif(has_vllm(), reason="this environment has vLLM")
def test_auto_is_our_engine_on_cuda_without_vllm(tiny_llama_dir: Path) -> None:
    served = ServedModel(
        model="tiny",
        weights=ArtifactRef(key="models/tiny", bytes=1000),
        serving=ServingOptions(engine="auto"),
    )
    assert not prefers_vllm(served, lambda ref: tiny_llama_dir, replace(LIMITS, device="cuda"))


@pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed in this environment")
def test_auto_is_vllm_on_cuda_for_models_that_it_fully_serves(
    tiny_llama_dir: Path, tiny_t5_dir: Path
) -> None:
    def is_vllm(folder: Path, **options: Any) -> bool:  # Any: serving options
        serving = ServingOptions(engine="auto", **options)
        weights = ArtifactRef(key="models/tiny", bytes=1000)
        served = ServedModel(model="tiny", weights=weights, serving=serving)
        return prefers_vllm(served, lambda ref: folder, replace(LIMITS, device="cuda"))

    draft = Draft(model="student", weights=ArtifactRef(key="models/student", bytes=500))
    assert is_vllm(tiny_llama_dir)
    assert not is_vllm(tiny_llama_dir, draft=draft)
    assert not is_vllm(tiny_llama_dir, weights="bfloat16")
    assert not is_vllm(tiny_t5_dir)
