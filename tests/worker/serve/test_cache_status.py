"""Use of the KV cache and of the prefix cache, as an engine reports it."""

from collections.abc import Callable

import pytest

from app.contracts.generation import Done, GenerateRequest, Reply
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.loading import LoadedModel

PROMPT = tuple(range(3, 43))


def test_usage_is_the_share_of_columns_that_hold_tokens(
    llama: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Callable[..., GenerateRequest],
    drain: Callable[[Engine], list[Reply]],
) -> None:
    engine = make_engine(llama, max_running=4, max_context_tokens=100)
    assert engine.cache_status() == (0.0, 0, 0)
    engine.add(make_request("a", tokens=PROMPT, max_tokens=8, ignore_eos=True))
    engine.add(make_request("b", tokens=PROMPT[:10], max_tokens=8, ignore_eos=True))
    engine.step()
    assert engine.cache_status().usage == pytest.approx(50 / 400)
    engine.step()
    assert engine.cache_status().usage == pytest.approx(52 / 400)
    drain(engine)
    assert engine.cache_status().usage == 0.0


def test_prefix_hits_are_the_cached_tokens_of_all_answers(
    loaded: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Callable[..., GenerateRequest],
    drain: Callable[[Engine], list[Reply]],
) -> None:
    engine = make_engine(loaded)
    done: list[Done] = []
    for number in range(3):
        engine.add(make_request(f"r{number}", tokens=(*PROMPT, number), n=2, max_tokens=2))
        done += [reply for reply in drain(engine) if isinstance(reply, Done)]
    status = engine.cache_status()
    # The choices of a request share its prompt.
    assert status.num_prefix_queries == sum(reply.prompt_tokens for reply in done) == 3 * 41
    assert status.num_prefix_hits == sum(reply.cached_tokens for reply in done) == 2 * 40
