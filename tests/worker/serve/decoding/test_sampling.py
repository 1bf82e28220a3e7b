"""Which token a row gets, and that its neighbours have no say in it."""

import collections
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from worker.serve.decoding.sampling import (
    SampledToken,
    TokenSampler,
    draw_from_sorted,
    pick_tokens,
    seeded_generator,
)


def draws(logits_V: Tensor, num_draws: int = 4000, **given: float) -> dict[int, float]:
    """Share of each token among many draws of one row."""
    samplers = [
        TokenSampler(temperature=1.0, generator=seeded_generator(seed)) for seed in range(num_draws)
    ]
    options: dict[str, Any] = {"temperature": 1.0} | given  # Any: int and float fields alike
    samplers = [TokenSampler(**options, generator=sampler.generator) for sampler in samplers]
    picks = pick_tokens(logits_V.expand(num_draws, -1), samplers)
    counts = collections.Counter(pick.token for pick in picks)
    return {token: count / num_draws for token, count in counts.items() if token is not None}


# token 1 is likeliest, then 3, 0, 2
LOGITS_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]


@pytest.mark.parametrize("vocab_size", [50, 256, 512, 1000])
def test_temperature_zero_takes_the_best_token(vocab_size: int) -> None:
    logits_NV = torch.randn(50, vocab_size, generator=seeded_generator(0))
    picks = pick_tokens(logits_NV, [TokenSampler()] * 50)
    assert [pick.token for pick in picks] == logits_NV.argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [50, 256, 1000])
def test_of_equal_tokens_the_first_is_taken_and_none_of_what_is_no_number(vocab_size: int) -> None:
    logits_NV = torch.full((4, vocab_size), -1.0)
    logits_NV[1, [vocab_size // 2, vocab_size - 1]] = 2.0
    logits_NV[2, vocab_size - 1] = float("nan")
    logits_NV[3] = -torch.inf
    picks = pick_tokens(logits_NV, [TokenSampler()] * 4)
    assert [pick.token for pick in picks] == [0, vocab_size // 2, None, None]


def test_temperature_one_draws_by_probability() -> None:
    shares = draws(LOGITS_V)
    assert shares == pytest.approx({1: 0.5, 3: 0.3, 0: 0.15, 2: 0.05}, abs=0.03)


def test_temperature_two_flattens() -> None:
    weights = {token: math.sqrt(p) for token, p in {1: 0.5, 3: 0.3, 0: 0.15, 2: 0.05}.items()}
    expected = {token: weight / sum(weights.values()) for token, weight in weights.items()}
    assert draws(LOGITS_V, temperature=2.0) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_the_k_best() -> None:
    assert draws(LOGITS_V, top_k=2) == pytest.approx({1: 0.625, 3: 0.375}, abs=0.03)


def test_top_k_breaks_ties_so_that_exactly_k_stay() -> None:
    assert len(draws(torch.zeros(6), top_k=2)) == 2


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    assert set(draws(LOGITS_V, top_p=0.7)) == {1, 3}
    assert set(draws(LOGITS_V, top_p=0.82)) == {1, 3, 0}


def test_a_tiny_top_p_still_leaves_the_best_token() -> None:
    assert draws(LOGITS_V, top_p=1e-9) == {1: 1.0}


def test_top_p_is_taken_of_what_top_k_left() -> None:
    # of the two best, the first has 0.625: enough for 0.6, though it is 0.5 of the whole
    assert draws(LOGITS_V, top_k=2, top_p=0.6) == {1: 1.0}


def test_min_p_keeps_what_has_that_share_of_the_best() -> None:
    assert set(draws(LOGITS_V, min_p=0.25)) == {1, 3, 0}
    assert set(draws(LOGITS_V, min_p=0.5)) == {1, 3}
    assert draws(LOGITS_V, num_draws=50, min_p=1.0) == {1: 1.0}


def test_min_p_is_of_the_tempered_distribution() -> None:
    # at temperature 2 the least likely has sqrt(0.05 / 0.5) = 0.32 of the best
    assert set(draws(LOGITS_V, temperature=2.0, min_p=0.3)) == {0, 1, 2, 3}
    assert set(draws(LOGITS_V, temperature=2.0, min_p=0.33)) == {0, 1, 3}


def test_min_p_of_a_flat_distribution_reaches_past_the_candidates() -> None:
    logits_V = torch.zeros(5000)
    logits_V[:500] = -1.0
    drawn = set(draws(logits_V, num_draws=2000, min_p=0.5))
    assert len(drawn) > 1200
    assert not drawn & set(range(500))


def test_impossible_tokens_are_never_drawn() -> None:
    logits_V = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    assert set(draws(logits_V)) == {1, 3}


def test_a_vocabulary_of_many_blocks_is_drawn_by_probability() -> None:
    # at the borders of the blocks
    shares = {
        0: 0.1,
        255: 0.25,
        256: 0.05,
        511: 0.2,
        512: 0.1,
        599: 0.3,
    }
    logits_V = torch.full((600,), -torch.inf)
    for token, share in shares.items():
        logits_V[token] = math.log(share)
    assert draws(logits_V) == pytest.approx(shares, abs=0.03)


def test_top_p_of_a_flat_distribution_reaches_past_the_candidates() -> None:
    logits_V = torch.zeros(5000)
    logits_V[:500] = -1.0  # the least likely: 4.5% of the mass among 10% of the tokens
    drawn = set(draws(logits_V, num_draws=2000, top_p=0.96))
    assert len(drawn) > 1200
    assert len(drawn & set(range(500))) < 20


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1e-4])
def test_hardly_any_temperature_is_greedy(temperature: float, filters: dict[str, float]) -> None:
    assert draws(LOGITS_V * 100, num_draws=20, temperature=temperature, **filters) == {1: 1.0}


def test_a_rows_pick_does_not_depend_on_its_neighbours() -> None:
    logits_NV = torch.randn(6, 300, generator=seeded_generator(1))
    settings = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.1), (1.3, 0, 0.9, 0.0)]
    settings += [(1.0, 40, 0.5, 0.0), (0.9, 0, 1.0, 0.1)]

    def samplers() -> list[TokenSampler]:
        return [
            TokenSampler(t, k, p, min_p, generator=seeded_generator(seed))
            for seed, (t, k, p, min_p) in enumerate(settings)
        ]

    together = pick_tokens(logits_NV, samplers())
    alone = [
        pick_tokens(logits_NV[row : row + 1], [sampler])[0]
        for row, sampler in enumerate(samplers())
    ]
    assert together == alone


def test_rows_that_are_sorted_together_get_the_tokens_that_each_gets_alone() -> None:
    """The one is how a GPU draws, the other how a CPU does."""
    settings = [(0.7, 0, 0.9, 0.0), (1.0, 5, 1.0, 0.1), (1.3, 40, 0.5, 0.0), (0.9, 0, 0.95, 0.2)]
    logits_NV = torch.randn(80, 3000, generator=seeded_generator(4))

    def samplers() -> list[TokenSampler]:
        return [
            TokenSampler(*settings[row % 4], generator=seeded_generator(row))
            for row in range(len(logits_NV))
        ]

    together = draw_from_sorted(logits_NV, samplers()).tolist()
    assert together == [pick.token for pick in pick_tokens(logits_NV.clone(), samplers())]
    logits_NV[0] = torch.nan  # on a GPU, an index out of range would end the process
    assert draw_from_sorted(logits_NV, samplers())[1:].tolist() == together[1:]


def test_a_seed_repeats_and_its_neighbour_differs() -> None:
    def tokens(seed: int) -> list[SampledToken]:
        generator = seeded_generator(seed)
        return [
            pick_tokens(torch.zeros(1, 300), [TokenSampler(1.0, generator=generator)])[0]
            for _ in range(8)
        ]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)


def test_negative_and_huge_seeds_are_seeds_too() -> None:
    assert seeded_generator(-1).initial_seed() == seeded_generator(2**63 - 1).initial_seed()
    assert seeded_generator(2**64 + 3).initial_seed() == 3


def test_sequences_without_a_seed_differ() -> None:
    picks = pick_tokens(torch.zeros(8, 10_000), [TokenSampler(1.0) for _ in range(8)])
    assert len({pick.token for pick in picks}) > 1


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits_NV = torch.randn(1, 50, generator=seeded_generator(2))
    sampler = TokenSampler(temperature=0.5, top_k=3, num_logprobs=4, generator=seeded_generator(0))
    [pick] = pick_tokens(logits_NV, [sampler])
    expected_V = logits_NV[0].log_softmax(-1)
    assert pick.token is not None
    assert pick.logprob == pytest.approx(float(expected_V[pick.token]), abs=1e-6)
    assert [token for token, _ in pick.top] == expected_V.argsort(descending=True)[:4].tolist()
    assert [value for _, value in pick.top] == pytest.approx(
        sorted(expected_V.tolist(), reverse=True)[:4]
    )


def test_zero_top_logprobs_gives_the_chosen_one_alone() -> None:
    [pick] = pick_tokens(torch.zeros(1, 4), [TokenSampler(num_logprobs=0)])
    assert pick.logprob == pytest.approx(math.log(0.25))
    assert pick.top == ()


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_number_gets_no_token_and_spoils_no_other(
    temperature: float, top_p: float
) -> None:
    logits_NV = torch.zeros(3, 10)
    logits_NV[:, 4] = 50.0
    logits_NV[1, 7] = torch.nan
    samplers = [TokenSampler(temperature, top_p=top_p, num_logprobs=1) for _ in range(3)]
    picks = pick_tokens(logits_NV, samplers)
    assert [pick.token for pick in picks] == [4, None, 4]
