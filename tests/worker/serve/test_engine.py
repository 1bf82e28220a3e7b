"""Requests against `generate()` one at a time, and everything a reply promises."""

import random
from collections.abc import Callable

import pytest
import torch

from app.contracts.generation import Delta, Done, Failure, GenerateRequest, Message, Reply
from tests.worker.serve.generated import answer_all, demand_texts_of_generate, generated
from worker.serve.engine import Engine, TransformersEngine, end_ids
from worker.serve.loading import LoadedModel

Make = Callable[..., GenerateRequest]
MakeEngine = Callable[..., TransformersEngine]
Drain = Callable[[Engine], list[Reply]]
TextOf = Callable[..., str]


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, 384) for _ in range(rng.randint(1, 40))) for _ in range(count)]


def test_text_equals_generate_one_at_a_time_whoever_joins_and_leaves(
    loaded: LoadedModel, make_engine: MakeEngine, make_request: Make, text_of: TextOf
) -> None:
    rng = random.Random(1)
    asked = {f"r{i}": (prompt, rng.randint(1, 40)) for i, prompt in enumerate(prompts(20, seed=1))}
    replies = answer_all(make_engine(loaded), make_request, asked)
    demand_texts_of_generate(replies, loaded, asked, text_of)


def test_the_last_delta_carries_the_reason_and_done_follows(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    engine.add(make_request(max_tokens=3))
    replies = drain(engine)
    deltas, [done] = replies[:-1], replies[-1:]
    assert [d.finish_reason for d in deltas if isinstance(d, Delta)] == [None] * (
        len(deltas) - 1
    ) + ["length"]
    assert isinstance(done, Done)
    assert done.completion_tokens == 3


def test_an_end_token_stops_and_is_neither_text_nor_token_but_counts(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    ends = {generated(llama, list(prompt), 40)[-1]: prompt for prompt in prompts(24, seed=0)}
    prompt = ends[llama.tokenizer.eos_token_id]
    expected = generated(llama, list(prompt), 40)
    engine.add(make_request(tokens=prompt, max_tokens=40, logprobs=0))
    replies = drain(engine)
    deltas = [reply for reply in replies if isinstance(reply, Delta)]
    assert deltas[-1].finish_reason == "stop"
    assert [token for d in deltas for token in d.tokens] == expected[:-1]
    assert len([found for d in deltas for found in d.logprobs or ()]) == len(expected) - 1
    assert isinstance(replies[-1], Done)
    assert replies[-1].completion_tokens == len(expected)


def test_ignore_eos_goes_on_to_max_tokens(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    for index, prompt in enumerate(prompts(24, seed=0)):
        engine.add(make_request(f"r{index}", tokens=prompt, max_tokens=40, ignore_eos=True))
    replies = drain(engine)
    assert {reply.completion_tokens for reply in replies if isinstance(reply, Done)} == {40}
    assert {reply.finish_reason for reply in replies if isinstance(reply, Delta)} == {
        None,
        "length",
    }


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(
    loaded: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    request = make_request(
        tokens=(5, 6, 7, 8), n=2, seed=11, temperature=0.9, top_p=0.95, max_tokens=20
    )
    alone = make_engine(loaded)
    alone.add(request)
    quiet = drain(alone)

    crowded = make_engine(loaded)
    for index, prompt in enumerate(prompts(5, seed=2)):
        crowded.add(
            make_request(
                f"other{index}", tokens=prompt, temperature=1.0, top_k=index, max_tokens=9 + index
            )
        )
    crowded.step()
    crowded.add(request)
    noisy = drain(crowded)
    for choice in (0, 1):
        assert text_of(quiet, choice=choice) == text_of(noisy, choice=choice)
    assert text_of(quiet, choice=0) != text_of(quiet, choice=1)


def test_choice_i_samples_with_seed_plus_i(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine = make_engine(llama)
    engine.add(make_request("three", n=3, seed=40, temperature=1.0, max_tokens=12))
    engine.add(make_request("one", n=1, seed=42, temperature=1.0, max_tokens=12))
    replies = drain(engine)
    assert text_of(replies, "three", 2) == text_of(replies, "one", 0)


def test_more_choices_than_rows_are_all_served(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama, max_running=3)
    engine.add(make_request(n=10, temperature=1.0, seed=0, max_tokens=5, ignore_eos=True))
    replies = drain(engine)
    ends = [reply.choice for reply in replies if isinstance(reply, Delta) and reply.finish_reason]
    assert sorted(ends) == list(range(10))
    assert [reply for reply in replies if not isinstance(reply, Delta)] == [
        Done(
            id="r", prompt_tokens=len(llama.tokenizer("The still").input_ids), completion_tokens=50
        )
    ]


def test_a_tenant_does_not_wait_for_all_that_another_has_waiting(
    loaded: LoadedModel,
    make_engine: Callable[..., TransformersEngine],
    make_request: Make,
    drain: Drain,
) -> None:
    engine = make_engine(loaded, max_running=2)
    engine.add(make_request("many", tenant="a", n=12, max_tokens=8, ignore_eos=True))
    for number in range(8):
        engine.add(make_request(f"a{number}", tenant="a", max_tokens=8, ignore_eos=True))
    replies = engine.step()
    engine.add(make_request("b", tenant="b", max_tokens=8, ignore_eos=True))
    ended = [reply.id for reply in [*replies, *drain(engine)] if isinstance(reply, Done)]
    assert ended == ["b", "many", *(f"a{number}" for number in range(8))]


def test_a_stop_string_ends_the_text_before_it_and_frees_the_row(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine = make_engine(llama)
    engine.add(make_request("free", max_tokens=60, ignore_eos=True))
    whole = text_of(drain(engine), "free")
    stop = whole[20:24]
    engine.add(make_request(max_tokens=60, ignore_eos=True, stop=(stop,)))
    replies = drain(engine)
    assert text_of(replies) == whole[: whole.index(stop)]
    assert [reply.finish_reason for reply in replies if isinstance(reply, Delta)][-1] == "stop"
    assert isinstance(replies[-1], Done)
    assert replies[-1].completion_tokens < 60
    assert engine.num_running == 0


def test_logprobs_equal_those_of_a_full_forward_pass(
    loaded: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(loaded)
    prompt = (5, 80, 200, 31)
    engine.add(make_request("other", tokens=(7,) * 30, max_tokens=30))
    engine.add(
        make_request(
            tokens=prompt, max_tokens=15, logprobs=3, temperature=0.7, seed=1, ignore_eos=True
        )
    )
    deltas = [reply for reply in drain(engine) if isinstance(reply, Delta) and reply.id == "r"]
    tokens = [token for delta in deltas for token in delta.tokens]
    shown = [found for delta in deltas for found in delta.logprobs or ()]
    assert len(tokens) == len(shown) == 15
    with torch.no_grad():
        logits_TV = loaded.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    logprobs_TV = logits_TV.log_softmax(-1)
    for row_V, token, found in zip(logprobs_TV, tokens, shown, strict=True):
        assert found.logprob == pytest.approx(float(row_V[token]), abs=1e-3)
        best = row_V.topk(3)
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_no_logprobs_unless_asked(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    engine.add(make_request())
    assert {reply.logprobs for reply in drain(engine) if isinstance(reply, Delta)} == {None}


def test_abort_frees_the_rows_at_once_and_nothing_follows(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    engine.add(make_request("gone", n=4, max_tokens=100))
    engine.add(make_request("stays", max_tokens=10))
    engine.step()
    assert engine.num_running == 5
    engine.abort("gone")
    assert (engine.num_running, engine.num_waiting) == (1, 0)
    assert {reply.id for reply in drain(engine)} == {"stays"}


def test_aborting_the_waiting_the_refused_and_the_unknown_leaves_nothing(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make
) -> None:
    engine = make_engine(llama)
    engine.add(make_request("waiting"))
    engine.add(make_request("refused", tokens=(9999,)))
    for name in ("waiting", "refused", "never seen"):
        engine.abort(name)
    assert not engine.has_work()


def test_what_is_wrong_with_a_request_is_its_only_reply(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama, max_context_tokens=32)
    engine.add(make_request("long", messages=(Message(role="user", content="The still " * 20),)))
    engine.add(make_request("fine"))
    replies = drain(engine)
    [failure] = [reply for reply in replies if reply.id == "long"]
    assert isinstance(failure, Failure)
    assert (failure.status, failure.code, failure.param) == (
        400,
        "context_length_exceeded",
        "messages",
    )
    assert any(isinstance(reply, Done) and reply.id == "fine" for reply in replies)


def test_the_models_own_context_is_a_limit_too(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama, max_context_tokens=100_000)
    engine.add(make_request(tokens=(5,) * 250, max_tokens=7))
    [failure] = drain(engine)
    assert isinstance(failure, Failure)
    assert "256 tokens" in failure.message


def test_an_answer_may_be_cut_to_the_context(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama, max_context_tokens=32)
    engine.add(make_request(tokens=(5,) * 20, max_tokens=5000, fits_context=True, ignore_eos=True))
    done = drain(engine)[-1]
    assert isinstance(done, Done)
    assert done.completion_tokens == 12


def test_a_passed_deadline_ends_running_and_waiting(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    now = [1000.0]
    engine = make_engine(llama, max_running=1, clock=lambda: now[0])
    engine.add(make_request("running", deadline_at=1010, max_tokens=100))
    engine.add(make_request("waiting", deadline_at=1010, max_tokens=100))
    engine.add(make_request("patient", deadline_at=2000, max_tokens=5))
    engine.step()
    now[0] = 1010.5
    replies = drain(engine)
    failures = {
        reply.id: (reply.status, reply.code) for reply in replies if isinstance(reply, Failure)
    }
    assert failures == dict.fromkeys(("running", "waiting"), (504, "request_timeout"))
    assert isinstance(replies[-1], Done)


def test_a_model_that_gives_no_numbers_fails_the_request(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    engine.add(make_request(n=2, max_tokens=9))
    engine.add(make_request("other", tokens=(9, 8), max_tokens=5))
    engine.step()
    engine._decoder.batch.cache.layers[0].values[0].fill_(torch.nan)
    replies = drain(engine)
    assert [reply.code for reply in replies if isinstance(reply, Failure)] == ["bad_logits"]
    assert [reply.id for reply in replies if isinstance(reply, Done)] == ["other"]


def test_end_tokens_come_from_every_source_that_names_one(llama: LoadedModel) -> None:
    class Named:
        eos_token_id = [7, 8]

    assert end_ids(llama.model, Named()) == {llama.tokenizer.eos_token_id, 7, 8}
