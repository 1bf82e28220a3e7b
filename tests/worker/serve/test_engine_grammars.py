"""Answers of the engine follow their grammar, for every kind of tokenizer and sampling option."""

import copy
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from app.contracts.generation import Delta, Done, Failure, GenerateRequest, Grammar, Reply
from worker.serve.engine import TransformersEngine, end_ids
from worker.serve.grammars import check_process, compiler
from worker.serve.loading import LoadedModel
from worker.serve.speculative import SpeculativeEngine

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["lamp", "jar", 'a "b"', "蒸馏"]},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 2,
        },
        "is_warm": {"type": ["boolean", "null"]},
    },
    "required": ["name", "kind", "sizes", "is_warm"],
    "additionalProperties": False,
}
GRAMMAR = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
Make = Callable[..., GenerateRequest]
MakeEngine = Callable[..., TransformersEngine]
Drain = Callable[[TransformersEngine], list[Reply]]


def texts_of(replies: list[Reply], request_id: str = "r") -> dict[int, str]:
    """The text of each choice; all of them must have ended by themselves."""
    texts: dict[int, str] = {}
    failures = [reply for reply in replies if isinstance(reply, Failure)]
    assert failures == []
    for delta in [reply for reply in replies if isinstance(reply, Delta)]:
        if delta.id == request_id:
            texts[delta.choice] = texts.get(delta.choice, "") + delta.text
            assert delta.finish_reason != "length", texts[delta.choice]
    return texts


def is_valid(text: str, schema: Any = SCHEMA) -> bool:  # Any: JSON
    return jsonschema_rs.Draft202012Validator(schema).is_valid(json.loads(text))


def answer(engine: TransformersEngine, drain: Drain, request: GenerateRequest) -> dict[int, str]:
    engine.add(request)
    return texts_of(drain(engine), request.id)


def with_end_ids(model: Any, named: list[int]) -> Any:  # Any: transformers is untyped here
    """A copy of a model whose configs name these end tokens."""
    model = copy.deepcopy(model)
    model.config.eos_token_id = model.generation_config.eos_token_id = named
    return model


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows these words only, and no end token."""
    tokens = {token: number for number, token in enumerate(["<unk>", *words])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(tokens, unk_token="<unk>")), unk_token="<unk>"
    )


@pytest.fixture(params=["llama", "gpt2", "t5", "bart", "bert2bert"])
def family(request: pytest.FixtureRequest) -> LoadedModel:
    loaded: LoadedModel = request.getfixturevalue(request.param)
    return loaded


def test_sampled_answers_of_every_kind_of_tokenizer_match_their_schema(
    family: LoadedModel, make_request: Make, make_engine: MakeEngine, drain: Drain
) -> None:
    engine = make_engine(family)
    request = make_request(grammar=GRAMMAR, n=20, temperature=1.0, seed=1, max_tokens=120)
    texts = answer(engine, drain, request)
    assert len(texts) == 20
    assert all(is_valid(text) for text in texts.values())
    assert len(set(texts.values())) > 10


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"top_p": 0.5, "temperature": 1.5, "seed": 2},
        {"top_k": 5, "min_p": 0.1, "temperature": 1.0, "seed": 3},
        {"frequency_penalty": 2.0, "presence_penalty": 1.0, "repetition_penalty": 1.5},
        {"logit_bias": ((5, 100.0), (40, -100.0))},
        {"min_tokens": 100},
        {"n": 2, "best_of": 4, "temperature": 1.0, "seed": 4},
        {"logprobs": 3},
    ],
)
def test_a_grammar_works_with_every_sampling_option(
    options: dict[str, Any],
    llama: LoadedModel,
    make_request: Make,
    make_engine: MakeEngine,
    drain: Drain,
) -> None:
    texts = answer(
        make_engine(llama), drain, make_request(grammar=GRAMMAR, max_tokens=120, **options)
    )
    assert texts
    assert all(is_valid(text) for text in texts.values())


def test_logprobs_are_those_of_the_raw_logits(
    llama: LoadedModel, make_request: Make, make_engine: MakeEngine, drain: Drain
) -> None:
    engine = make_engine(llama)
    engine.add(make_request("free", logprobs=5, max_tokens=1))
    engine.add(make_request("bound", logprobs=5, max_tokens=1, grammar=GRAMMAR))
    deltas = {reply.id: reply for reply in drain(engine) if isinstance(reply, Delta)}
    free, bound = deltas["free"].logprobs, deltas["bound"].logprobs
    assert free is not None
    assert bound is not None
    assert dict(bound[0].top) == pytest.approx(dict(free[0].top))
    assert bound[0].logprob is not None
    assert free[0].logprob is not None
    assert bound[0].logprob < free[0].logprob
    assert bound[0].token.startswith("{")


def test_rows_without_a_grammar_are_not_changed_by_those_beside_them(
    loaded: LoadedModel,
    make_request: Make,
    make_engine: MakeEngine,
    drain: Drain,
    text_of: Callable[..., str],
) -> None:
    free = make_request("r", max_tokens=20, ignore_eos=True, temperature=1.0, seed=7)
    alone = make_engine(loaded)
    alone.add(free)
    expected = text_of(drain(alone))
    engine = make_engine(loaded)
    for number in range(3):
        engine.add(make_request(f"g{number}", grammar=GRAMMAR, max_tokens=120))
    engine.add(free)
    assert text_of(drain(engine)) == expected


@pytest.mark.parametrize(
    ("grammar", "allowed"),
    [
        (Grammar(kind="regex", text=r"lamp|jar|a\.b"), {"lamp", "jar", "a.b"}),
        (
            Grammar(kind="lark", text='start: "x" NUMBER\nNUMBER: /[0-9]/'),
            {f"x{i}" for i in range(10)},
        ),
    ],
)
def test_regexes_and_lark_grammars_bound_the_answer(
    grammar: Grammar,
    allowed: set[str],
    family: LoadedModel,
    make_request: Make,
    make_engine: MakeEngine,
    drain: Drain,
) -> None:
    request = make_request(grammar=grammar, n=8, temperature=2.0, seed=5, max_tokens=20)
    texts = set(answer(make_engine(family), drain, request).values())
    assert texts
    assert texts <= allowed


def test_an_answer_that_reaches_max_tokens_ends_with_length(
    llama: LoadedModel, make_request: Make, make_engine: MakeEngine, drain: Drain
) -> None:
    engine = make_engine(llama)
    engine.add(make_request(grammar=GRAMMAR, max_tokens=3))
    *_, delta, done = drain(engine)
    assert isinstance(delta, Delta)
    assert delta.finish_reason == "length"
    assert isinstance(done, Done)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        # no text matches it, which is found only when the first mask is computed
        (Grammar(kind="json_schema", text='{"$ref":"#"}'), "too complex"),
        # its automaton has too many states
        (Grammar(kind="regex", text="(.{1,1000}){1,1000}"), "too complex"),
        (Grammar(kind="regex", text="(a"), "cannot be enforced"),
        (
            Grammar(kind="json_schema", text='{"oneOf":[{"type":"string"},{"minLength":2}]}'),
            "oneOf",
        ),
    ],
)
def test_a_grammar_that_fails_ends_its_own_request_with_a_failure(
    grammar: Grammar,
    message: str,
    llama: LoadedModel,
    make_request: Make,
    make_engine: MakeEngine,
    drain: Drain,
) -> None:
    engine = make_engine(llama)
    engine.add(make_request("bad", grammar=grammar, max_tokens=200, temperature=1.0, seed=6))
    engine.add(make_request("good", grammar=GRAMMAR, max_tokens=120))
    replies = drain(engine)
    (failure,) = [reply for reply in replies if isinstance(reply, Failure)]
    assert (failure.id, failure.status, failure.param) == ("bad", 400, "response_format")
    assert message in failure.message
    good = [reply for reply in replies if isinstance(reply, Delta) and reply.id == "good"]
    assert is_valid("".join(delta.text for delta in good))


@pytest.mark.parametrize("named", [[], [10**6]])
def test_a_model_without_a_usable_end_token_serves_requests_without_a_grammar(
    named: list[int],
    llama: LoadedModel,
    make_request: Make,
    make_engine: MakeEngine,
    drain: Drain,
) -> None:
    model = with_end_ids(llama.model, named)
    engine = make_engine(replace(llama, model=model, tokenizer=tokenizer_of(["the", "still"])))
    engine.prepare_grammars()
    engine.add(make_request("free", tokens=(1, 2)))
    engine.add(make_request("bound", tokens=(1, 2), grammar=GRAMMAR))
    (failure,) = [reply for reply in drain(engine) if isinstance(reply, Failure)]
    assert (failure.id, failure.status, failure.param) == ("bound", 400, "response_format")
    assert "no end token" in failure.message


def test_one_usable_end_token_is_enough(
    llama: LoadedModel, make_request: Make, make_engine: MakeEngine, drain: Drain
) -> None:
    (end_id, *_) = end_ids(llama.model)
    engine = make_engine(replace(llama, model=with_end_ids(llama.model, [end_id, 10**6])))
    engine.prepare_grammars()
    request = make_request(grammar=GRAMMAR, max_tokens=120)
    assert is_valid(answer(engine, drain, request)[0])


def test_a_tokenizer_without_letters_serves_requests_without_a_grammar(
    llama: LoadedModel, make_request: Make, make_engine: MakeEngine, drain: Drain
) -> None:
    engine = make_engine(replace(llama, tokenizer=tokenizer_of(["1", "2"])))
    engine.prepare_grammars()
    engine.add(make_request("free", tokens=(1, 2)))
    engine.add(make_request("bound", tokens=(1, 2), grammar=GRAMMAR))
    (failure,) = [reply for reply in drain(engine) if isinstance(reply, Failure)]
    assert (failure.id, failure.status, failure.param) == ("bound", 400, "response_format")
    assert "the tokenizer of this model does not support grammars" in failure.message


def test_adding_a_request_does_not_wait_for_the_grammars_of_others(
    llama: LoadedModel,
    make_request: Make,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "MAX_CACHED", 1)
    monkeypatch.setattr(check_process, "MAX_REMEMBERED", 1)
    engine = make_engine(llama)
    request = make_request(grammar=Grammar(kind="regex", text="evicted"))
    prompt = engine.prompt_of(request)
    engine.prompt_of(make_request(grammar=Grammar(kind="regex", text="other")))
    add = threading.Thread(target=engine.add, args=(request, prompt), daemon=True)
    with check_process.GRAMMAR_CHECKER._lock:  # as during a slow compilation
        add.start()
        add.join(timeout=20)
        assert not add.is_alive()
    assert engine.num_waiting == 1


def test_a_draft_does_not_change_an_answer_with_a_grammar(
    llama: LoadedModel, make_request: Make, make_engine: MakeEngine, drain: Drain
) -> None:
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 8}):
        drafted = SpeculativeEngine(
            llama.model, llama.tokenizer, max_running=4, max_context_tokens=256, draft=llama
        )
        request = make_request(grammar=GRAMMAR, max_tokens=120, **options)
        text = answer(drafted, drain, request)[0]
        assert is_valid(text)
        assert drafted.draft_counts.num_accepted > 0
        if not options["temperature"]:
            assert text == answer(make_engine(llama), drain, request)[0]
