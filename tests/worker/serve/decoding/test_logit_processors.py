"""Logit bias, penalties and min_tokens against a plain loop over one row, and what they leave untouched."""

import collections
import math
import random

import pytest
import torch
from torch import Tensor

from app.contracts.generation import Sampling
from worker.serve.decoding.logit_processors import (
    LogitsProcessor,
    process_logits,
    processor_for,
    refuse_unknown_tokens,
)
from worker.serve.decoding.sampling import TokenSampler, pick_tokens, seeded_generator
from worker.serve.errors import InvalidLogitBias

VOCAB = 40
ENDS = frozenset({2, 7})
EVERYTHING = Sampling(
    max_tokens=30,
    min_tokens=4,
    frequency_penalty=0.7,
    presence_penalty=-0.4,
    repetition_penalty=1.6,
    logit_bias=((5, 3.0), (7, 50.0), (9, -100.0)),
)
ASKED = [
    EVERYTHING,
    Sampling(max_tokens=30, frequency_penalty=-1.5),
    Sampling(max_tokens=30, presence_penalty=2.0),
    Sampling(max_tokens=30, repetition_penalty=0.4),
    Sampling(max_tokens=30, logit_bias=((0, 1.5), (39, -2.0))),
    Sampling(max_tokens=30, min_tokens=6),
    Sampling(max_tokens=30),
]
PROMPT = (3, 5, 5, 11, 2)


def expected_row(
    raw: list[float], sampling: Sampling, prompt: tuple[int, ...], answer: list[int]
) -> list[float]:
    """The definition, a token at a time."""
    row = []
    for token, logit in enumerate(raw):
        changed = logit + dict(sampling.logit_bias).get(token, 0.0)
        if token in prompt or token in answer:
            penalty = sampling.repetition_penalty
            changed = changed / penalty if changed > 0 else changed * penalty
        if token in answer:
            changed -= sampling.presence_penalty + sampling.frequency_penalty * answer.count(token)
        if token in ENDS and len(answer) < sampling.min_tokens:
            changed = -math.inf
        row.append(changed)
    return row


def expected_shares(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """Temperature, then top-k, top-p and min-p in this order, each of what the one before left."""
    best = max(row)
    left = {token: math.exp((logit - best) / temperature) for token, logit in enumerate(row)}
    ranked = sorted(left, key=lambda token: -left[token])[: top_k or None]
    whole, reached, kept = sum(left[token] for token in ranked), 0.0, []
    for token in ranked:
        if reached < top_p * whole:
            kept.append(token)
        reached += left[token]
    kept = [token for token in kept if left[token] >= min_p * left[kept[0]]]
    return {token: left[token] / sum(left[t] for t in kept) for token in kept}


def logits_of(seed: int, num_rows: int) -> Tensor:
    return 2 * torch.randn(num_rows, VOCAB, generator=seeded_generator(seed))


def test_each_row_is_changed_as_the_definition_says_whatever_its_neighbours_ask() -> None:
    rng = random.Random(0)
    processors = [processor_for(sampling, context=PROMPT, end_ids=ENDS) for sampling in ASKED]
    answers: list[list[int]] = [[] for _ in ASKED]
    for step in range(12):
        logits_NV = logits_of(step, len(ASKED))
        raw = logits_NV.tolist()
        process_logits(logits_NV, processors)
        for row, sampling in enumerate(ASKED):
            expected = expected_row(raw[row], sampling, PROMPT, answers[row])
            assert logits_NV[row].tolist() == pytest.approx(expected, abs=1e-4)
        for processor, answer in zip(processors, answers, strict=True):
            answer.append(rng.randrange(8, 14))
            if processor is not None:
                processor.record(answer[-1])


def test_a_request_without_such_parameters_has_no_processor() -> None:
    plain = Sampling(temperature=0.5, top_k=3, stop=("x",))
    assert processor_for(plain, context=PROMPT, end_ids=ENDS) is None
    assert processor_for(Sampling(min_tokens=3), context=PROMPT, end_ids=frozenset()) is None
    assert process_logits(torch.zeros(2, 4), [None, None]) is None


def test_the_raw_logits_are_back_after_the_pick() -> None:
    logits_NV = logits_of(1, 3)
    before_NV = logits_NV.clone()
    processors = [LogitsProcessor(EVERYTHING, context=PROMPT, end_ids=ENDS), None, None]
    pick_tokens(logits_NV, [TokenSampler(processor=processor) for processor in processors])
    assert torch.equal(logits_NV, before_NV)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits_NV = logits_of(2, 1)
    banned = int(logits_NV.argmax())
    processor = processor_for(Sampling(logit_bias=((banned, -100.0),)), context=(), end_ids=ENDS)
    [pick] = pick_tokens(logits_NV, [TokenSampler(processor=processor, num_logprobs=1)])
    expected_V = logits_NV[0].log_softmax(-1)
    assert pick.token == int(expected_V.argsort(descending=True)[1])
    assert pick.logprob == pytest.approx(float(expected_V[pick.token]))
    [(token, logprob)] = pick.top
    assert token == banned
    assert logprob == pytest.approx(float(expected_V.max()))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.2),
        (1.4, 6, 1.0, 0.3),
        (1.2, 0, 0.8, 0.1),
        (1.5, 9, 0.7, 0.25),
    ],
)
def test_draws_follow_the_whole_definition(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    answer, num_draws = [11, 11, 30, 4, 5], 3000
    raw_V = logits_of(3, 1)[0]

    def sampler(seed: int) -> TokenSampler:
        processor = LogitsProcessor(EVERYTHING, context=PROMPT, end_ids=ENDS)
        for token in answer:
            processor.record(token)
        return TokenSampler(
            temperature, top_k, top_p, min_p, generator=seeded_generator(seed), processor=processor
        )

    picks = pick_tokens(raw_V.repeat(num_draws, 1), [sampler(seed) for seed in range(num_draws)])
    counts = collections.Counter(pick.token for pick in picks)
    row = expected_row(raw_V.tolist(), EVERYTHING, PROMPT, answer)
    expected = expected_shares(row, temperature, top_k, top_p, min_p)
    assert set(counts) <= set(expected)
    assert {t: counts[t] / num_draws for t in expected} == pytest.approx(expected, abs=0.035)


def test_a_rows_picks_do_not_depend_on_its_neighbours() -> None:
    def samplers() -> list[TokenSampler]:
        return [
            TokenSampler(
                0.9,
                min_p=0.02,
                generator=seeded_generator(row),
                processor=processor_for(sampling, context=PROMPT, end_ids=ENDS),
            )
            for row, sampling in enumerate(ASKED)
        ]

    together, alone = samplers(), samplers()
    for step in range(10):
        logits_NV = logits_of(100 + step, len(ASKED))
        picks = pick_tokens(logits_NV, together)
        assert picks == [
            pick_tokens(logits_NV[i : i + 1], [alone[i]])[0] for i in range(len(ASKED))
        ]


def test_no_bias_brings_an_end_token_before_min_tokens() -> None:
    asked = Sampling(min_tokens=3, logit_bias=((7, 100.0),), repetition_penalty=0.1)
    sampler = TokenSampler(processor=processor_for(asked, context=PROMPT, end_ids=ENDS))
    tokens = [pick_tokens(logits_of(step, 1), [sampler])[0].token for step in range(4)]
    assert not ENDS & set(tokens[:3])
    assert tokens[3] == 7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_hardly_any_repetition_penalty_still_gives_numbers(temperature: float) -> None:
    asked = Sampling(repetition_penalty=1e-300)
    sampler = TokenSampler(
        temperature, 0, 0.9, processor=processor_for(asked, context=PROMPT, end_ids=ENDS)
    )
    logits_NV = logits_of(4, 1).abs()
    [pick] = pick_tokens(logits_NV, [sampler])
    assert pick.token == max(PROMPT, key=lambda token: float(logits_NV[0, token]))


def test_a_bias_of_an_unknown_token_is_refused_by_name() -> None:
    refuse_unknown_tokens(Sampling(logit_bias=((0, 1.0), (39, 1.0))), VOCAB)
    with pytest.raises(InvalidLogitBias, match="token 40 of logit_bias"):
        refuse_unknown_tokens(Sampling(logit_bias=((0, 1.0), (40, 1.0))), VOCAB)
