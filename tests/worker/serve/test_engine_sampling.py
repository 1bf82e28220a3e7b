"""Penalties, stop tokens, min_tokens, echo and best_of of whole requests, against generate() where it knows the same."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch

from app.contracts.generation import Delta, Done, Failure, GenerateRequest, Reply
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.loading import LoadedModel

Make = Callable[..., GenerateRequest]
MakeEngine = Callable[..., TransformersEngine]
Drain = Callable[[Engine], list[Reply]]
TextOf = Callable[..., str]
PROMPT = (5, 80, 60, 31, 80)


def generated(
    loaded: LoadedModel, num_tokens: int, **options: Any
) -> list[int]:  # Any: of generate()
    inputs = torch.tensor([PROMPT])
    output = loaded.model.generate(  # type: ignore[operator]  # a method, typed as a tensor
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_tokens,
        do_sample=False,
        **options,
    )
    num_before = 1 if loaded.model.config.is_encoder_decoder else len(PROMPT)  # type: ignore[union-attr]  # a config
    tokens: list[int] = output[0, num_before:].tolist()
    return tokens


def tokens_of(replies: list[Reply], request_id: str = "r", choice: int = 0) -> list[int]:
    deltas = [reply for reply in replies if isinstance(reply, Delta)]
    return [token for d in deltas if (d.id, d.choice) == (request_id, choice) for token in d.tokens]


def ending_of(replies: list[Reply], request_id: str = "r", choice: int = 0) -> str | None:
    """Returns the finish_reason of a choice."""
    deltas = [reply for reply in replies if isinstance(reply, Delta)]
    return [d.finish_reason for d in deltas if (d.id, d.choice) == (request_id, choice)][-1]


@pytest.mark.parametrize("penalty", [0.6, 1.3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert2bert"])
def test_repetition_penalty_and_min_tokens_are_those_of_generate(
    name: str,
    penalty: float,
    make_engine: MakeEngine,
    make_request: Make,
    drain: Drain,
    request: Any,
) -> None:
    loaded: LoadedModel = request.getfixturevalue(name)
    engine = make_engine(loaded)
    engine.add(make_request("other", tokens=(7, 8), max_tokens=12, frequency_penalty=1.0))
    engine.add(
        make_request(tokens=PROMPT, max_tokens=24, min_tokens=24, repetition_penalty=penalty)
    )
    expected = generated(loaded, 24, repetition_penalty=penalty, min_new_tokens=24)
    assert tokens_of(drain(engine)) == expected


@pytest.mark.parametrize(
    "asked",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"logit_bias": ((40, 6.0), (41, -100.0))},
    ],
    ids=str,
)
def test_penalties_give_what_a_plain_forward_pass_and_a_loop_give(
    loaded: LoadedModel,
    make_engine: MakeEngine,
    make_request: Make,
    drain: Drain,
    next_logits: Any,
    asked: Any,
) -> None:
    engine = make_engine(loaded)
    engine.add(make_request("other", tokens=(7,) * 9, max_tokens=20))
    engine.add(make_request(tokens=PROMPT, max_tokens=20, ignore_eos=True, **asked))
    answer: list[int] = []
    for _ in range(20):
        logits = next_logits(loaded.model, [*PROMPT, *answer]).tolist()
        for token, bias in asked.get("logit_bias", ()):
            logits[token] += bias
        for token in set(answer):
            logits[token] -= asked.get("presence_penalty", 0.0)
            logits[token] -= asked.get("frequency_penalty", 0.0) * answer.count(token)
        answer.append(logits.index(max(logits)))
    assert tokens_of(drain(engine)) == answer


def test_penalties_and_a_seed_give_the_same_text_alone_and_in_a_crowd(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    options = {
        "temperature": 1.0,
        "min_p": 0.05,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
    }
    request = make_request(n=2, seed=11, max_tokens=20, min_tokens=15, **options)
    alone = make_engine(llama)
    alone.add(request)
    quiet = drain(alone)
    crowded = make_engine(llama)
    for index in range(4):
        asked = {"presence_penalty": index - 1.0, "logit_bias": ((index, 4.0),)}
        crowded.add(make_request(f"other{index}", tokens=(9,) * (index + 1), max_tokens=9, **asked))
    crowded.step()
    crowded.add(request)
    noisy = drain(crowded)
    for choice in (0, 1):
        assert text_of(quiet, choice=choice) == text_of(noisy, choice=choice)


def test_an_answer_may_end_right_after_min_tokens(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    bias = ((llama.tokenizer.eos_token_id, 100.0),)
    engine.add(make_request(max_tokens=20, min_tokens=7, logit_bias=bias))
    replies = drain(engine)
    assert len(tokens_of(replies)) == 7
    assert isinstance(replies[-1], Done)
    assert replies[-1].completion_tokens == 8  # the end token counts


def test_no_stop_string_is_looked_for_before_min_tokens(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine = make_engine(llama)
    engine.add(make_request("free", max_tokens=40, ignore_eos=True))
    whole = text_of(drain(engine), "free")
    engine.add(make_request("first", max_tokens=10, ignore_eos=True))
    num_characters = len(text_of(drain(engine), "first"))
    stop = whole[0]
    at = whole.find(stop, num_characters)
    engine.add(make_request(max_tokens=40, min_tokens=10, ignore_eos=True, stop=(stop,)))
    assert text_of(drain(engine)) == (whole if at < 0 else whole[:at])


def test_a_stop_token_ends_a_choice_before_its_text(
    loaded: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine = make_engine(loaded)
    asked: dict[str, Any] = {"n": 2, "seed": 4, "temperature": 1.0, "ignore_eos": True}
    engine.add(make_request("free", max_tokens=30, **asked))
    whole = tokens_of(drain(engine), "free")
    stop = whole[12]
    num_before = whole.index(stop)
    engine.add(make_request("other", tokens=(7, 8), max_tokens=30, ignore_eos=True))
    engine.add(make_request("stopped", max_tokens=30, stop_token_ids=(0, stop), **asked))
    engine.add(make_request("cut", max_tokens=num_before, **asked))
    replies = drain(engine)
    assert tokens_of(replies, "stopped") == whole[:num_before]
    assert text_of(replies, "stopped") == text_of(replies, "cut")
    assert ending_of(replies, "stopped") == "stop"
    assert len(tokens_of(replies, "other")) == 30


def test_an_end_token_of_the_model_still_ends_an_answer_beside_stop_tokens(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    bias = ((llama.tokenizer.eos_token_id, 100.0),)
    engine.add(make_request(max_tokens=9, logit_bias=bias, stop_token_ids=(40,)))
    assert ending_of(drain(engine)) == "stop"
    engine.add(make_request(max_tokens=9, logit_bias=bias, stop_token_ids=(40,), ignore_eos=True))
    assert ending_of(drain(engine)) == "length"


def test_no_stop_token_comes_before_min_tokens(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    engine = make_engine(llama)
    asked: dict[str, Any] = {"logit_bias": ((40, 100.0),), "ignore_eos": True, "max_tokens": 20}
    engine.add(make_request(stop_token_ids=(40,), min_tokens=7, **asked))
    replies = drain(engine)
    assert len(tokens_of(replies)) == 7
    assert 40 not in tokens_of(replies)
    assert ending_of(replies) == "stop"
    assert isinstance(replies[-1], Done)
    assert replies[-1].completion_tokens == 8  # the stop token counts


def test_echo_puts_the_prompts_text_first_in_every_choice(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine = make_engine(llama)
    asked: dict[str, Any] = {"n": 2, "seed": 1, "temperature": 1.0, "stop": ("still",)}
    for echo in (False, True):
        engine.add(make_request(f"text{echo}", text="The still ", echo=echo, **asked))
        tokens = tuple(llama.tokenizer("The still ").input_ids)
        engine.add(make_request(f"tokens{echo}", tokens=tokens, echo=echo, **asked))
    replies = drain(engine)
    for kind in ("text", "tokens"):
        for choice in (0, 1):
            expected = "The still " + text_of(replies, f"{kind}False", choice)
            assert text_of(replies, f"{kind}True", choice) == expected


def test_best_of_gives_the_likeliest_by_the_mean_and_counts_them_all(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine = make_engine(llama)
    asked: dict[str, Any] = {"seed": 3, "temperature": 1.5, "max_tokens": 9, "ignore_eos": True}
    engine.add(make_request("all", n=8, logprobs=0, **asked))
    engine.add(make_request("best", n=3, best_of=8, echo=True, **asked))
    replies = drain(engine)
    means = {}
    for choice in range(8):
        deltas = [
            r for r in replies if isinstance(r, Delta) and (r.id, r.choice) == ("all", choice)
        ]
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        means[choice] = fmean(entry.logprob for entry in entries if entry.logprob is not None)
        assert len(entries) == 9
    ranked = sorted(means, key=lambda choice: -means[choice])
    assert [text_of(replies, "best", choice) for choice in range(3)] == [
        "The still" + text_of(replies, "all", choice) for choice in ranked[:3]
    ]
    best = [reply for reply in replies if reply.id == "best"]
    assert [reply.logprobs for reply in best if isinstance(reply, Delta)] == [None] * 3
    assert isinstance(best[-1], Done)
    assert best[-1].completion_tokens == 8 * 9


def test_what_a_model_cannot_do_is_refused_by_name(
    t5: LoadedModel,
    bert2bert: LoadedModel,
    make_engine: MakeEngine,
    make_request: Make,
    drain: Drain,
) -> None:
    for loaded in (t5, bert2bert):
        engine = make_engine(loaded)
        width = len(one_steps_logits(loaded))
        engine.add(
            make_request("known", logit_bias=((width - 1, 100.0),), max_tokens=3, ignore_eos=True)
        )
        engine.add(make_request("unknown", logit_bias=((width, 1.0),)))
        engine.add(make_request("stop", stop_token_ids=(width - 1, width)))
        engine.add(make_request("echo", echo=True))
        replies = drain(engine)
        assert tokens_of(replies, "known") == [width - 1] * 3
        failures = {r.id: (r.status, r.param) for r in replies if isinstance(r, Failure)}
        assert failures == {
            "unknown": (400, "logit_bias"),
            "stop": (400, "stop_token_ids"),
            "echo": (400, "echo"),
        }
        assert any(str(width) in r.message for r in replies if isinstance(r, Failure))


def one_steps_logits(loaded: LoadedModel) -> list[float]:
    """The logits of one step: as many as the model has words to write."""
    tokens = torch.tensor([[5]])
    with torch.no_grad():
        logits: list[float] = (
            loaded.model(input_ids=tokens, decoder_input_ids=tokens).logits[0, 0].tolist()
        )
    return logits
