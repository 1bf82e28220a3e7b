"""Encoder-decoders behind the engine: the prompt is encoded, the answer is the decoder's alone."""

import random
from collections.abc import Callable

import pytest

from app.contracts.generation import Delta, Done, Failure, GenerateRequest, Message, Reply
from tests.worker.serve.generated import answer_all, demand_texts_of_generate, generated
from worker.serve.batch_generate import generate_all
from worker.serve.engine import Engine, TransformersEngine, end_ids
from worker.serve.errors import PromptTooLong
from worker.serve.loading import LoadedModel

Make = Callable[..., GenerateRequest]
MakeEngine = Callable[..., TransformersEngine]
Drain = Callable[[Engine], list[Reply]]
TextOf = Callable[..., str]
NUM_TOKENS = 150  # the vocabularies have more


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [
        tuple(rng.randrange(5, NUM_TOKENS) for _ in range(rng.randint(1, 40))) for _ in range(count)
    ]


def test_text_equals_generate_one_at_a_time_whoever_joins_and_leaves(
    encoder_decoder: LoadedModel, make_engine: MakeEngine, make_request: Make, text_of: TextOf
) -> None:
    rng = random.Random(1)
    asked = {f"r{i}": (prompt, rng.randint(1, 30)) for i, prompt in enumerate(prompts(12, seed=1))}
    replies = answer_all(make_engine(encoder_decoder), make_request, asked)
    demand_texts_of_generate(replies, encoder_decoder, asked, text_of)


def test_a_pile_of_prompts_is_answered_as_by_generate(encoder_decoder: LoadedModel) -> None:
    asked = prompts(8, seed=2)
    found = generate_all(encoder_decoder.model, asked, max_new_tokens=25, max_running=3)
    assert [list(each.tokens) for each in found] == [
        generated(encoder_decoder, list(p), 25) for p in asked
    ]


def test_text_keeps_the_special_tokens_of_the_tokenizer(
    encoder_decoder: LoadedModel,
    make_engine: MakeEngine,
    make_request: Make,
    drain: Drain,
    text_of: TextOf,
) -> None:
    ids = encoder_decoder.tokenizer("The still is warm").input_ids
    assert ids[-1] in end_ids(encoder_decoder.model, encoder_decoder.tokenizer)
    engine = make_engine(encoder_decoder)
    engine.add(make_request("text", text="The still is warm", max_tokens=12))
    engine.add(make_request("tokens", tokens=tuple(ids), max_tokens=12))
    replies = drain(engine)
    assert text_of(replies, "text") == text_of(replies, "tokens") != ""
    [done, _] = [reply for reply in replies if isinstance(reply, Done)]
    assert done.prompt_tokens == len(ids)


def test_choices_share_what_was_encoded(
    bart: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine = make_engine(bart)
    engine.add(make_request("three", n=3, seed=40, temperature=1.0, max_tokens=12))
    engine.add(make_request("other", tokens=(30,) * 40, n=2, seed=1, temperature=1.0, max_tokens=5))
    replies = engine.step()
    assert engine._decoder.batch.num_rows == 5
    replies += drain(engine)
    alone = make_engine(bart)
    alone.add(make_request("one", seed=42, temperature=1.0, max_tokens=12))
    assert text_of(replies, "three", 2) == text_of(drain(alone), "one")
    assert len({text_of(replies, "three", choice) for choice in range(3)}) == 3


def test_a_stop_string_ends_the_text_before_it(
    bart: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine = make_engine(bart)
    engine.add(make_request("free", max_tokens=40, ignore_eos=True))
    whole = text_of(drain(engine), "free")
    stop = whole[12:15]
    engine.add(make_request(max_tokens=40, ignore_eos=True, stop=(stop,)))
    assert text_of(drain(engine)) == whole[: whole.index(stop)]
    assert engine.num_running == 0


def test_abort_midway_leaves_the_others_as_they_were(
    encoder_decoder: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    first, second = prompts(2, seed=5)
    engine = make_engine(encoder_decoder)
    engine.add(make_request("gone", tokens=first, n=3, max_tokens=100, ignore_eos=True))
    engine.add(make_request("stays", tokens=second, max_tokens=10, ignore_eos=True))
    replies = engine.step() + engine.step()
    engine.abort("gone")
    assert engine.num_running == 1
    replies += drain(engine)
    stays = [r for r in replies if isinstance(r, Delta) and r.id == "stays"]
    [expected] = generate_all(
        encoder_decoder.model, [second], max_new_tokens=10, end_ids=frozenset()
    )
    assert tuple(token for delta in stays for token in delta.tokens) == expected.tokens


def test_prompt_and_answer_have_a_limit_each(
    encoder_decoder: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(encoder_decoder, max_context_tokens=32)
    engine.add(make_request("full", tokens=(9,) * 32, max_tokens=32, ignore_eos=True))
    engine.add(make_request("prompt", tokens=(9,) * 33, max_tokens=1))
    engine.add(make_request("answer", tokens=(9,), max_tokens=33))
    engine.add(
        make_request("fits", tokens=(9,), max_tokens=5000, fits_context=True, ignore_eos=True)
    )
    replies = drain(engine)
    done = {reply.id: reply.completion_tokens for reply in replies if isinstance(reply, Done)}
    assert done == {"full": 32, "fits": 32}
    failures = {reply.id: reply for reply in replies if isinstance(reply, Failure)}
    assert {name: (f.status, f.code, f.param) for name, f in failures.items()} == {
        "prompt": (400, "context_length_exceeded", "prompt"),
        "answer": (400, "context_length_exceeded", "max_tokens"),
    }
    assert "reads at most 32 tokens, but the prompt has 33" in failures["prompt"].message
    assert "at most 32 tokens, but max_tokens is 33" in failures["answer"].message


@pytest.mark.parametrize("name", ["bart", "bert2bert"])
def test_positions_end_where_the_model_ends(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name).model
    [found] = generate_all(model, [[9] * 256], max_new_tokens=400, end_ids=frozenset())
    assert len(found.tokens) == 256
    with pytest.raises(
        PromptTooLong, match="257 tokens does not fit in the encoder, which takes at most 256"
    ):
        generate_all(model, [[9] * 257], max_new_tokens=4)


def test_relative_positions_have_no_end(t5: LoadedModel) -> None:
    [found] = generate_all(t5.model, [[9] * 300], max_new_tokens=270, end_ids=frozenset())
    assert len(found.tokens) == 270


def test_messages_need_a_chat_template(
    bart: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(bart)
    engine.add(make_request(messages=(Message(role="user", content="Who?"),)))
    [failure] = drain(engine)
    assert isinstance(failure, Failure)
    assert (failure.status, failure.code) == (400, "no_chat_template")


@pytest.mark.parametrize(("name", "status"), [("t5", 400), ("bert2bert", 400)])
def test_no_tokens_at_all_are_refused_and_an_empty_text_is_not(
    name: str,
    status: int,
    request: pytest.FixtureRequest,
    make_engine: MakeEngine,
    make_request: Make,
    drain: Drain,
) -> None:
    engine = make_engine(request.getfixturevalue(name))
    engine.add(make_request("text", text=""))
    engine.add(make_request("tokens", tokens=()))
    replies = {reply.id: reply for reply in drain(engine) if not isinstance(reply, Delta)}
    failure = replies["tokens"]
    assert isinstance(failure, Failure)
    assert (failure.status, failure.param) == (status, "prompt")
    assert isinstance(replies["text"], Done)
