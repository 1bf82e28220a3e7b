"""An engine with a draft against the engine without one, for drafts that are bad, middling and perfect."""

import copy
import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from app.contracts.control import ServedModel
from app.contracts.generation import (
    Delta,
    Done,
    Draft,
    Failure,
    GenerateRequest,
    Reply,
    ServingOptions,
)
from app.contracts.messages import ArtifactRef
from tests.tiny import save_tiny
from worker.serve.decoding.sampling import TokenSampler, draw, probabilities, seeded_generator
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.errors import DraftUnsupported
from worker.serve.host.engine_factory import EngineLimits, LoadProgress, make_ready
from worker.serve.loading import LoadedModel, load_model
from worker.serve.speculative import DraftCounts, Proposal, SpeculativeEngine, accept_or_draw

pytestmark = pytest.mark.usefixtures("small_first_buffers")

Make = Callable[..., GenerateRequest]
MakeEngine = Callable[..., TransformersEngine]
Drain = Callable[[Engine], list[Reply]]
TextOf = Callable[..., str]
# 99.9% of true hypotheses give a smaller chi-square, by degrees of freedom
CHI_SQUARE = {7: 24.32, 15: 37.70, 26: 54.05}


def shaken(loaded: LoadedModel, amount: float) -> LoadedModel:
    """The model with noise on its weights, so that its draft is right now and then."""
    model = copy.deepcopy(loaded.model)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(amount * weight.std() * torch.randn(weight.shape, generator=noise))
    return LoadedModel(model, loaded.tokenizer, loaded.num_bytes)


@pytest.fixture(scope="session")
def bloom(tiny_bloom_dir: Path) -> LoadedModel:
    return load_model(tiny_bloom_dir)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Another random model with the tiny models' tokenizer."""
    return load_model(save_tiny(tmp_path_factory.mktemp("draft"), "llama", num_layers=1, seed=9))


@pytest.fixture(scope="session")
def middling(llama: LoadedModel) -> LoadedModel:
    return shaken(llama, 0.05)


def speculative(
    loaded: LoadedModel, draft: LoadedModel, **given: Any
) -> SpeculativeEngine:  # Any: engine's fields
    options = {
        "max_running": 6,
        "max_context_tokens": 256,
        "num_draft_tokens": 3,
        "max_drafting": 6,
        "min_confidence": 0.0,
    } | given
    return SpeculativeEngine(loaded.model, loaded.tokenizer, draft=draft, **options)


def scheduled(engine: Engine, make_request: Make, seed: int) -> list[Reply]:
    """Requests that join and leave at random times, some aborted; the same for every engine of a seed."""
    rng = random.Random(seed)
    asked = [
        make_request(
            f"r{i}",
            tokens=tuple(rng.randrange(3, 384) for _ in range(rng.randint(1, 40))),
            max_tokens=rng.randint(1, 30),
        )
        for i in range(14)
    ]
    moments = sorted(rng.randint(0, 40) for _ in asked)
    replies: list[Reply] = []
    step = 0
    while asked or engine.has_work():
        while asked and moments[0] <= step:
            engine.add(asked.pop(0))
            moments.pop(0)
        if step % 9 == 4:
            engine.add(make_request("leaver", tokens=(9, 8, 7), max_tokens=100))
            replies += engine.step()
            engine.abort("leaver")
        replies += engine.step()
        step += 1
    return [reply for reply in replies if reply.id != "leaver"]


def outcome(replies: list[Reply]) -> dict[tuple[str, int], Any]:
    """What each choice came to, in how many pieces so ever it was delivered."""
    found: dict[tuple[str, int], Any] = {}
    for reply in replies:
        if isinstance(reply, Delta):
            text, tokens, shown, _ = found.get((reply.id, reply.choice), ("", (), (), None))
            found[reply.id, reply.choice] = (
                text + reply.text,
                tokens + reply.tokens,
                shown + tuple((entry.token, len(entry.top)) for entry in reply.logprobs or ()),
                reply.finish_reason,
            )
        else:
            found[reply.id, -1] = reply
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("quality", ["bad", "middling", "perfect"])
def test_greedy_text_is_that_of_the_model_alone_whoever_joins_and_leaves(
    loaded: LoadedModel,
    stranger: LoadedModel,
    make_engine: MakeEngine,
    make_request: Make,
    quality: str,
    seed: int,
) -> None:
    draft = {
        "bad": lambda: stranger,
        "middling": lambda: shaken(loaded, 0.05),
        "perfect": lambda: loaded,
    }[quality]()
    engine = speculative(loaded, draft, num_draft_tokens=1 + 2 * seed)
    expected = scheduled(make_engine(loaded), make_request, seed)
    assert outcome(scheduled(engine, make_request, seed)) == outcome(expected)
    rate = engine.draft_counts.acceptance_rate
    assert {"bad": rate < 0.1, "middling": 0.1 < rate < 0.95, "perfect": rate == 1.0}[quality]


def test_alibi_survives_what_is_cut_back(
    bloom: LoadedModel, make_engine: MakeEngine, make_request: Make
) -> None:
    engine = speculative(bloom, shaken(bloom, 0.02))
    assert outcome(scheduled(engine, make_request, 5)) == outcome(
        scheduled(make_engine(bloom), make_request, 5)
    )
    assert 0.1 < engine.draft_counts.acceptance_rate < 0.95


def test_a_perfect_draft_gives_as_many_tokens_a_round_as_there_are_to_give(
    llama: LoadedModel, make_request: Make, drain: Drain
) -> None:
    engine = speculative(llama, llama, num_draft_tokens=4)
    engine.add(make_request(max_tokens=31, ignore_eos=True))
    drain(engine)
    counts = engine.draft_counts
    assert counts == DraftCounts(num_rounds=6, num_proposed=24, num_accepted=24, num_tokens=30)
    assert (counts.mean_accepted, counts.tokens_a_round) == (4.0, 5.0)


def test_a_draft_that_is_unsure_offers_less_and_is_right_more_often(
    llama: LoadedModel, middling: LoadedModel, make_engine: MakeEngine, make_request: Make
) -> None:
    expected = outcome(scheduled(make_engine(llama), make_request, 1))
    engines = [speculative(llama, middling, min_confidence=least) for least in (0.0, 0.3, 0.6, 1.1)]
    for engine in engines:
        assert outcome(scheduled(engine, make_request, 1)) == expected
    counts = [engine.draft_counts for engine in engines]
    assert [c.num_proposed for c in counts] == sorted(
        {c.num_proposed for c in counts}, reverse=True
    )
    assert counts[0].acceptance_rate < counts[1].acceptance_rate < counts[2].acceptance_rate
    assert counts[3] == DraftCounts(
        num_rounds=counts[3].num_rounds, num_tokens=counts[3].num_rounds
    )


def test_above_the_limit_the_draft_rests_and_comes_back(
    llama: LoadedModel, middling: LoadedModel, make_engine: MakeEngine, make_request: Make
) -> None:
    engine = speculative(llama, middling, max_drafting=2)
    expected = outcome(scheduled(make_engine(llama), make_request, 3))
    assert outcome(scheduled(engine, make_request, 3)) == expected
    always = speculative(llama, middling)
    scheduled(always, make_request, 3)
    assert 0 < engine.draft_counts.num_rounds < always.draft_counts.num_rounds


ASKED: dict[str, dict[str, Any]] = {
    "several choices": {"n": 3, "max_tokens": 20},
    "log-probabilities": {"logprobs": 3, "max_tokens": 25, "ignore_eos": True},
    "best_of": {"n": 2, "best_of": 4, "logprobs": 1, "max_tokens": 9},
    "echo": {"echo": True, "max_tokens": 9},
    "min_tokens": {"min_tokens": 11, "max_tokens": 30},
    "stop tokens": {"stop_token_ids": tuple(range(3, 384, 6)), "max_tokens": 40},
    "penalties": {
        "frequency_penalty": 1.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.3,
        "max_tokens": 40,
        "ignore_eos": True,
    },
    "bias": {"logit_bias": ((30, 4.0), (31, -50.0)), "max_tokens": 20},
}


@pytest.mark.parametrize("name", ASKED)
def test_a_greedy_request_is_answered_as_without_a_draft(
    llama: LoadedModel,
    middling: LoadedModel,
    make_engine: MakeEngine,
    make_request: Make,
    drain: Drain,
    name: str,
) -> None:
    results = []
    for engine in (make_engine(llama), speculative(llama, middling)):
        for i, prompt in enumerate([(5, 6, 7), (40, 41, 42, 43), (99,)]):
            engine.add(make_request(f"r{i}", tokens=prompt, **ASKED[name]))
        results.append(outcome(drain(engine)))
    assert results[0] == results[1]


def test_log_probabilities_are_the_models_and_not_the_drafts(
    llama: LoadedModel, middling: LoadedModel, make_request: Make, drain: Drain
) -> None:
    engine = speculative(llama, middling)
    prompt = (5, 80, 200, 31)
    engine.add(make_request(tokens=prompt, max_tokens=15, logprobs=2, ignore_eos=True))
    deltas = [reply for reply in drain(engine) if isinstance(reply, Delta)]
    tokens = [token for delta in deltas for token in delta.tokens]
    shown = [entry.logprob for delta in deltas for entry in delta.logprobs or ()]
    with torch.no_grad():
        logits_TV = llama.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    expected = logits_TV.log_softmax(-1)[range(15), tokens].tolist()
    assert shown == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("at", range(20, 26))
def test_a_stop_string_within_an_accepted_run_ends_the_text_there(
    llama: LoadedModel, make_request: Make, drain: Drain, text_of: TextOf, at: int
) -> None:
    engine = speculative(llama, llama, num_draft_tokens=8)
    engine.add(make_request("free", max_tokens=60, ignore_eos=True))
    whole = text_of(drain(engine), "free")
    stop = whole[at : at + 3]
    engine.add(make_request(max_tokens=60, ignore_eos=True, stop=(stop,)))
    engine.add(make_request("beside", tokens=(8, 9), max_tokens=60, ignore_eos=True))
    replies = drain(engine)
    assert text_of(replies) == whole[: whole.index(stop)]
    assert [r.finish_reason for r in replies if isinstance(r, Delta) and r.id == "r"][-1] == "stop"
    assert {r.id for r in replies if isinstance(r, Done)} == {"r", "beside"}


def test_an_end_token_within_an_accepted_run_is_the_last(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    results = []
    for engine in (
        make_engine(llama),
        speculative(llama, llama, num_draft_tokens=8, max_drafting=32),
    ):
        rng = random.Random(0)
        for i in range(24):
            prompt = tuple(rng.randrange(3, 384) for _ in range(rng.randint(1, 40)))
            engine.add(make_request(f"r{i}", tokens=prompt, max_tokens=40))
        results.append(outcome(drain(engine)))
    assert results[0] == results[1]
    assert "stop" in {found[-1] for found in results[0].values() if isinstance(found, tuple)}


def test_an_answer_may_fill_the_models_last_position(
    gpt2: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    results = []
    for engine in (make_engine(gpt2), speculative(gpt2, shaken(gpt2, 0.02), num_draft_tokens=7)):
        engine.add(
            make_request(tokens=(5,) * 230, max_tokens=99, fits_context=True, ignore_eos=True)
        )
        results.append(outcome(drain(engine)))
    assert results[0] == results[1]
    assert results[0]["r", -1].completion_tokens == 26


def test_abort_and_deadline_free_the_rows_of_model_and_draft(
    llama: LoadedModel, middling: LoadedModel, make_request: Make, drain: Drain
) -> None:
    now = [1000.0]
    engine = speculative(llama, middling, clock=lambda: now[0])
    engine.add(make_request("gone", n=2, max_tokens=100, deadline_at=2000))
    engine.add(make_request("late", max_tokens=100, deadline_at=1010))
    for _ in range(3):
        engine.step()
    engine.abort("gone")
    assert engine.num_running == engine._speculative.draft.num_rows == 1
    now[0] = 1011.0
    assert [reply.code for reply in drain(engine) if isinstance(reply, Failure)] == [
        "request_timeout"
    ]
    assert engine._speculative.draft.num_rows == 0


def test_a_draft_that_gives_no_numbers_costs_time_alone(
    llama: LoadedModel, make_engine: MakeEngine, make_request: Make, drain: Drain
) -> None:
    broken = shaken(llama, 0.0)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[60:].fill_(torch.nan)  # type: ignore[operator]
    results = []
    for engine in (make_engine(llama), speculative(llama, broken)):
        engine.add(make_request(tokens=(5, 6, 7), max_tokens=20))
        engine.add(
            make_request(
                "sampled", tokens=(5, 6, 7), max_tokens=20, temperature=1.0, ignore_eos=True
            )
        )
        results.append(outcome(drain(engine)))
    assert results[0]["r", 0] == results[1]["r", 0]
    assert results[1]["sampled", -1].completion_tokens == 20


def test_a_model_that_gives_no_numbers_fails_the_request(
    llama: LoadedModel, middling: LoadedModel, make_request: Make, drain: Drain
) -> None:
    engine = speculative(llama, middling)
    engine.add(make_request(max_tokens=9))
    engine.add(make_request("other", tokens=(9, 8), max_tokens=5))
    engine.step()
    engine._speculative.target.cache.layers[0].values[0].fill_(torch.nan)
    replies = drain(engine)
    assert [reply.code for reply in replies if isinstance(reply, Failure)] == ["bad_logits"]
    assert [reply.id for reply in replies if isinstance(reply, Done)] == ["other"]


def test_a_draft_in_the_serving_options_is_attached(
    tiny_llama_dir: Path, make_request: Make, drain: Drain
) -> None:
    weights = ArtifactRef(key="models/tiny", bytes=1000)
    serving = ServingOptions(draft=Draft(model="draft", weights=weights, num_tokens=2))
    limits = EngineLimits(max_running=2, max_context_tokens=64, device="cpu", clock=time.time)
    served = ServedModel(model="tiny", weights=weights, serving=serving)
    ready = make_ready(
        served, lambda ref: tiny_llama_dir, limits, LoadProgress(served.stored_bytes)
    )
    assert isinstance(ready.engine, SpeculativeEngine)
    ready.engine.add(make_request(max_tokens=7, ignore_eos=True))
    assert isinstance(drain(ready.engine)[-1], Done)
    counts = ready.engine.draft_counts
    assert counts.num_proposed == counts.num_accepted > 0


def test_drafts_of_another_kind_are_refused(
    llama: LoadedModel, t5: LoadedModel, tmp_path: Path, stranger: LoadedModel
) -> None:
    other_words = load_model(save_tiny(tmp_path, "llama", num_layers=1, kind="wordpiece"))
    for model, draft in ((t5, stranger), (llama, t5), (llama, other_words)):
        with pytest.raises(DraftUnsupported):
            speculative(model, draft)


def chi_square(counts: Counter[Any], expected: dict[Any, float]) -> float:
    """Pearson's statistic; cells that expect fewer than five are put together."""
    total = sum(counts.values())
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-6)
    rare = [cell for cell, share in expected.items() if share * total < 5]
    cells = [[cell] for cell in expected if cell not in rare] + ([rare] if rare else [])
    found = 0.0
    for group in cells:
        wanted = total * sum(expected[cell] for cell in group)
        found += (sum(counts[cell] for cell in group) - wanted) ** 2 / wanted
    assert sum(counts[cell] for cell in expected) == total, (
        "a token that has no probability was drawn"
    )
    return found


FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
}


@pytest.mark.parametrize("name", FILTERS)
def test_accepted_or_drawn_tokens_have_the_models_distribution(name: str) -> None:
    sampler = TokenSampler(**{"temperature": 1.0, **FILTERS[name]}, generator=seeded_generator(3))  # type: ignore[arg-type]
    logits_2V = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    draft_V, wanted_V = (probabilities(logits_V, sampler) for logits_V in logits_2V)
    counts: Counter[int] = Counter()
    proposed: Counter[int] = Counter()
    for _ in range(5000):
        offer = Proposal(draw(draft_V, sampler), draft_V)
        proposed[offer.token] += 1
        counts[accept_or_draw(offer, wanted_V, sampler)] += 1
    expected = {token: share for token, share in enumerate(wanted_V.tolist()) if share}
    assert chi_square(counts, expected) < CHI_SQUARE[7]
    in_common = Counter({token: proposed[token] for token in expected})
    assert (
        sum(proposed.values()) > sum(in_common.values())
        or chi_square(proposed, expected) > 10 * CHI_SQUARE[7]
    )


def test_more_proposals_are_accepted_the_nearer_the_draft_is() -> None:
    sampler = TokenSampler(temperature=1.0, generator=seeded_generator(0))
    wanted_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for draft_V in (wanted_V, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)):
        offers = [Proposal(draw(draft_V, sampler), draft_V) for _ in range(4000)]
        rate = (
            sum(accept_or_draw(offer, wanted_V, sampler) == offer.token for offer in offers) / 4000
        )
        assert rate == pytest.approx(float(torch.minimum(wanted_V, draft_V).sum()), abs=0.03)


def test_the_engines_samples_have_the_models_joint_distribution(
    llama: LoadedModel, make_request: Make, drain: Drain
) -> None:
    """Three tokens out of three words, under temperature and a penalty: 27 answers, each with its own probability."""
    words, prompt, temperature, penalty = (20, 57, 140), (5, 6, 7), 2.0, 1.0
    engine = speculative(
        llama, shaken(llama, 0.1), max_running=64, max_drafting=64, min_confidence=0.4
    )
    for i in range(6):
        engine.add(
            make_request(
                f"r{i}",
                tokens=prompt,
                n=128,
                seed=1000 * i,
                max_tokens=3,
                temperature=temperature,
                frequency_penalty=penalty,
                logit_bias=tuple((word, 60.0) for word in words),
                ignore_eos=True,
            )
        )
    answers = {key: found[1] for key, found in outcome(drain(engine)).items() if key[1] >= 0}
    expected = {}
    for answer in product(words, repeat=3):
        with torch.no_grad():
            logits_TV = llama.model(torch.tensor([[*prompt, *answer]])).logits[
                0, len(prompt) - 1 : -1
            ]
        share = 1.0
        for position, token in enumerate(answer):
            logits_W = logits_TV[position, list(words)]
            logits_W -= penalty * torch.tensor([answer[:position].count(word) for word in words])
            share *= float((logits_W / temperature).softmax(-1)[words.index(token)])
        expected[answer] = share
    counts = Counter(answers.values())
    assert len(answers) == 6 * 128
    assert chi_square(counts, expected) < CHI_SQUARE[26]
    assert 0.2 < engine.draft_counts.acceptance_rate < 0.98


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(
    loaded: LoadedModel, make_request: Make, drain: Drain, text_of: TextOf
) -> None:
    draft = shaken(loaded, 0.05)
    request = make_request(
        tokens=(5, 6, 7, 8), n=2, seed=11, temperature=0.9, top_p=0.95, max_tokens=20
    )
    alone = speculative(loaded, draft, max_drafting=2, min_confidence=0.3)
    alone.add(request)
    quiet = drain(alone)
    crowded = speculative(loaded, draft, max_drafting=2, min_confidence=0.3)
    for i in range(4):
        crowded.add(
            make_request(
                f"other{i}", tokens=(9, 30 + i), temperature=1.0, top_k=i, max_tokens=9 + 3 * i
            )
        )
    crowded.step()
    crowded.add(request)
    noisy = drain(crowded)
    for choice in (0, 1):
        assert text_of(quiet, choice=choice) == text_of(noisy, choice=choice) != ""
    assert text_of(quiet, choice=0) != text_of(quiet, choice=1)
