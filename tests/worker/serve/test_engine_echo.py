"""Echoed prompts with log-probabilities, as lm-evaluation-harness reads them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from app.contracts.generation import Delta, Done, Failure, GenerateRequest, Reply, TokenLogprob
from tests.worker.serve.generated import generated
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.loading import LoadedModel
from worker.serve.speculative import SpeculativeEngine

Make = Callable[..., GenerateRequest]
MakeEngine = Callable[..., TransformersEngine]
Drain = Callable[[Engine], list[Reply]]
PROMPT = tuple(range(40, 70))


def entries_of(replies: list[Reply], request_id: str = "r", choice: int = 0) -> list[TokenLogprob]:
    deltas = [
        r for r in replies if isinstance(r, Delta) and (r.id, r.choice) == (request_id, choice)
    ]
    return [entry for delta in deltas for entry in delta.logprobs or ()]


def expected_of(loaded: LoadedModel, tokens: list[int]) -> list[float]:
    with torch.no_grad():
        logits_TV = loaded.model(torch.tensor([tokens])).logits[0].float()
    logprobs_TV = logits_TV.log_softmax(-1)
    return [float(logprobs_TV[at, token]) for at, token in enumerate(tokens[1:])]


def test_the_entries_are_those_of_the_prompt_and_of_the_answer(
    loaded: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: Any
) -> None:
    engine = make_engine(loaded)
    others: dict[str, Any] = {f"o{i}": tuple(range(3 + i, 20 + 5 * i)) for i in range(4)}
    for name, tokens in others.items():
        engine.add(make_request(name, tokens=tokens, echo=True, logprobs=1, max_tokens=2))
    engine.add(make_request(tokens=PROMPT, echo=True, logprobs=2, max_tokens=3))
    replies = drain(engine)
    for name, tokens in {**others, "r": PROMPT}.items():
        num_tokens = 3 if name == "r" else 2
        answer = generated(loaded, list(tokens), num_tokens)
        entries = entries_of(replies, name)
        assert entries[0].logprob is None
        logprobs = [entry.logprob for entry in entries[1:]]
        assert logprobs == pytest.approx(expected_of(loaded, [*tokens, *answer]), abs=1e-4)
        assert text_of(replies, name).startswith(loaded.tokenizer.decode(tokens))


def test_an_end_token_has_an_entry_too(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    engine._end_ids = frozenset(range(400))  # every token ends an answer
    engine.add(make_request(tokens=PROMPT, echo=True, logprobs=1, max_tokens=1))
    entries = entries_of(drain(engine))
    assert len(entries) == len(PROMPT) + 1
    assert entries[-1].logprob is not None


def test_without_answer_tokens_the_prompt_may_fill_the_context(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama, max_context_tokens=len(PROMPT))
    engine.add(make_request(tokens=PROMPT, echo=True, logprobs=0, max_tokens=0, n=2))
    replies = drain(engine)
    for choice in (0, 1):
        assert len(entries_of(replies, choice=choice)) == len(PROMPT)
    assert isinstance(replies[-1], Done)
    assert (replies[-1].prompt_tokens, replies[-1].completion_tokens) == (len(PROMPT), 0)


def test_a_repeated_prompt_is_scored_again_and_counts_its_cached_tokens_without_scores(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    first = drain_one(engine, make_request("a", tokens=PROMPT, echo=True, logprobs=1), drain)
    again = drain_one(engine, make_request("b", tokens=PROMPT, echo=True, logprobs=1), drain)
    # the second time, the batch has another width, and float32 sums another order
    assert [e.logprob for e in entries_of(again, "b")[1:]] == pytest.approx(
        [e.logprob for e in entries_of(first, "a")[1:]], abs=1e-4
    )
    plain = drain_one(engine, make_request("c", tokens=(*PROMPT, 5)), drain)
    assert isinstance(plain[-1], Done)
    assert plain[-1].cached_tokens == len(PROMPT)
    assert isinstance(first[-1], Done)
    assert first[-1].cached_tokens == 0


def drain_one(engine: Engine, request: GenerateRequest, drain: Drain) -> list[Reply]:
    engine.add(request)
    return drain(engine)


def test_an_engine_with_a_draft_scores_prompts(
    llama: LoadedModel, make_request: Make, drain: Drain
) -> None:
    engine = SpeculativeEngine(
        llama.model, llama.tokenizer, max_running=2, max_context_tokens=128, draft=llama, num_draft_tokens=2
    )  # fmt: skip
    engine.add(make_request(tokens=PROMPT, echo=True, logprobs=1, max_tokens=5))
    entries = entries_of(drain(engine))
    tokens = [*PROMPT, *generated(llama, list(PROMPT), 5)]
    assert [e.logprob for e in entries[1:]] == pytest.approx(expected_of(llama, tokens), abs=1e-4)


def test_an_encoder_decoder_refuses(
    t5: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(t5)
    engine.add(make_request(tokens=(5, 6), echo=True, logprobs=1))
    [failure] = drain(engine)
    assert isinstance(failure, Failure)
    assert failure.param == "echo"


@pytest.mark.parametrize("best_of", [None, 3])
def test_all_choices_share_the_entries_of_the_prompt(
    llama: LoadedModel,
    make_engine: MakeEngine,
    make_request: Make,
    drain: Drain,
    best_of: int | None,
) -> None:
    """To convert them again for each choice would block the engine thread."""
    engine = make_engine(llama)
    given: dict[str, Any] = {"echo": True, "logprobs": 3, "max_tokens": 2, "best_of": best_of}
    engine.add(make_request(tokens=PROMPT, n=2, **given))
    replies = drain(engine)
    one, two = (entries_of(replies, choice=choice)[: len(PROMPT)] for choice in range(2))
    assert len(one) == len(PROMPT)
    assert all(a is b for a, b in zip(one, two, strict=True))
