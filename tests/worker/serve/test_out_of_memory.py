"""Exhausted memory ends one request with a clear error. The others get the same text as without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from app.contracts.generation import Done, Failure, GenerateRequest, Reply
from worker.serve.device_memory import PrefillMemory
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.loading import LoadedModel
from worker.serve.speculative import SpeculativeEngine

Make = Callable[..., GenerateRequest]
Drain = Callable[[Engine], list[Reply]]
TextOf = Callable[..., str]
NUM_FAULTS = 25  # operations of a step that fail, each in a run of its own
REQUESTS = {"a": (3, 5), "b": (11, 4), "c": (40, 6)}  # length and first token of their prompts


class FailingOperation(TorchDispatchMode):
    """Counts operations. The one with the number `failing` runs out of memory."""

    def __init__(self, failing: int | None = None) -> None:
        super().__init__()
        self.failing = failing
        self.num_operations = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Any: torch does not type what it dispatches
        self.num_operations += 1
        if self.num_operations == self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return operation(*args, **(kwargs or {}))


def request(make: Make, name: str) -> GenerateRequest:
    length, first = REQUESTS[name]
    tokens = tuple(range(first, first + length))
    return make(
        name,
        tokens=tokens,
        max_tokens=40,
        ignore_eos=True,
        n=2 if name == "c" else 1,
    )


def texts(replies: list[Reply], text_of: TextOf) -> dict[str, str]:
    ended = [reply.id for reply in replies if isinstance(reply, Done)]
    return {name: text_of(replies, name) for name in ended}


def check(
    engine: Callable[[], TransformersEngine],
    make_request: Make,
    drain: Drain,
    text_of: TextOf,
    *,
    num_steps: int,
) -> None:
    """Lets operations of one step fail: that in which c joins, or a later one."""

    def run(failing: int | None) -> tuple[int, list[Reply]]:
        each = engine()
        for name in ("a", "b"):
            each.add(request(make_request, name))
        replies = [reply for _ in range(3) for reply in each.step()]
        each.add(request(make_request, "c"))
        replies += [reply for _ in range(num_steps) for reply in each.step()]
        with FailingOperation(failing) as mode:
            replies += each.step()
        replies += drain(each)
        assert each.num_running == each.num_waiting == 0
        return mode.num_operations, replies

    num_operations, replies = run(None)
    expected = texts(replies, text_of)
    assert expected.keys() == REQUESTS.keys()
    for failing in range(1, num_operations + 1, max(1, num_operations // NUM_FAULTS)):
        _, replies = run(failing)
        failures = [reply for reply in replies if isinstance(reply, Failure)]
        completed = texts(replies, text_of)
        assert failures, "the operation has failed"
        assert {(failure.status, failure.code) for failure in failures} == {(503, "out_of_memory")}
        assert completed.keys() | {failure.id for failure in failures} == REQUESTS.keys()
        assert completed == {name: expected[name] for name in completed}


@pytest.mark.usefixtures("small_first_buffers")
@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_exhausted_memory_ends_requests_and_not_the_engine(
    loaded: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Drain,
    text_of: TextOf,
    num_steps: int,
) -> None:
    check(lambda: make_engine(loaded), make_request, drain, text_of, num_steps=num_steps)


@pytest.mark.usefixtures("small_first_buffers")
@pytest.mark.parametrize("num_steps", [0, 5])
def test_exhausted_memory_ends_requests_with_chunks_and_static_steps(
    loaded: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Drain,
    text_of: TextOf,
    num_steps: int,
) -> None:
    """As on a GPU: c is read in chunks of 16 tokens, and decode steps have fixed addresses."""

    class SmallMemory(PrefillMemory):
        def num_tokens(self, num_columns: int) -> int:
            return 16

    def engine() -> TransformersEngine:
        made = make_engine(loaded, steps="static")
        made._decoder.batch.prefill_memory = SmallMemory(1, 1)
        return made

    check(engine, make_request, drain, text_of, num_steps=num_steps)


@pytest.mark.usefixtures("small_first_buffers")
@pytest.mark.parametrize("num_steps", [0, 1])
def test_exhausted_memory_ends_requests_of_an_encoder_decoder(
    t5: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Drain,
    text_of: TextOf,
    num_steps: int,
) -> None:
    check(lambda: make_engine(t5), make_request, drain, text_of, num_steps=num_steps)


@pytest.mark.usefixtures("small_first_buffers")
def test_exhausted_memory_ends_requests_with_a_draft(
    llama: LoadedModel, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    def engine() -> TransformersEngine:
        return SpeculativeEngine(
            llama.model,
            llama.tokenizer,
            max_running=8,
            max_context_tokens=128,
            draft=llama,
            max_drafting=4,
        )

    check(engine, make_request, drain, text_of, num_steps=2)


def test_other_sequences_continue_if_a_prefill_exhausts_memory(
    loaded: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Drain,
) -> None:
    engine = make_engine(loaded)
    engine.add(request(make_request, "c"))
    for _ in range(2):  # a decode step follows every prefill
        engine.step()
    engine.add(request(make_request, "a"))
    with FailingOperation(5):
        replies = engine.step()
    assert [reply.id for reply in replies if isinstance(reply, Failure)] == ["a"]
    assert [reply.id for reply in drain(engine) if isinstance(reply, Done)] == ["c"]


def test_sequences_wait_for_memory(
    loaded: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Drain,
    text_of: TextOf,
) -> None:
    engine = make_engine(loaded)
    for name in REQUESTS:
        engine.add(request(make_request, name))
    expected = texts(drain(engine), text_of)
    assert engine.cache_bytes > 0
    engine.free_cache()
    assert engine.cache_bytes == 0
    engine.add(request(make_request, "a"))
    engine.step()
    row_bytes = engine._decoder.batch.row_bytes
    engine.limit_cache(2 * row_bytes)
    for name in ("b", "c"):
        engine.add(request(make_request, name))
    replies: list[Reply] = []
    while engine.has_work():
        replies += engine.step()
        assert engine.num_running <= 2
    assert texts(replies, text_of).keys() == expected.keys()


def test_one_sequence_runs_even_without_memory_for_it(
    loaded: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Drain,
) -> None:
    engine = make_engine(loaded)
    engine.add(request(make_request, "a"))
    engine.step()
    engine.limit_cache(-1)
    engine.add(request(make_request, "b"))
    assert [reply.id for reply in drain(engine) if isinstance(reply, Done)] == ["a", "b"]
