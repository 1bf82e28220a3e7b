from collections import Counter
from random import Random

import pytest

from app.contracts.batch_plan import BatchPlan, batch_tokens_of, eval_steps_of
from app.contracts.distillation import EarlyStopping, Hyperparameters

LENGTHS = [Random(0).randint(3, 60) for _ in range(200)]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_holds_every_row_once(epoch: int) -> None:
    batches = BatchPlan(LENGTHS, batch_tokens=128, seed=3).epoch(epoch)
    assert Counter(row for batch in batches for row in batch) == Counter(range(len(LENGTHS)))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_batch_stays_within_its_tokens_with_padding(epoch: int) -> None:
    for batch in BatchPlan(LENGTHS, batch_tokens=128, seed=3).epoch(epoch):
        assert max(LENGTHS[row] for row in batch) * len(batch) <= 128


def test_a_row_longer_than_a_batch_is_alone() -> None:
    assert sorted(map(sorted, BatchPlan([50, 400, 60], batch_tokens=128, seed=0).epoch(0))) == [
        [0, 2],
        [1],
    ]


def test_batches_waste_little_on_padding() -> None:
    batches = BatchPlan(LENGTHS, batch_tokens=512, seed=3).epoch(1)
    padded = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches)
    assert padded < 1.2 * sum(LENGTHS)


def test_a_plan_made_again_is_the_same_and_epochs_differ() -> None:
    one, other = (BatchPlan(LENGTHS, batch_tokens=128, seed=3) for _ in range(2))
    assert one.epoch(4) == other.epoch(4)
    assert len({str(one.epoch(number)) for number in range(4)}) == 4
    assert one.epoch(1) != BatchPlan(LENGTHS, batch_tokens=128, seed=4).epoch(1)


def test_steps_are_counted_over_the_epochs_up_to_the_limit() -> None:
    plan = BatchPlan(LENGTHS, batch_tokens=128, seed=3)
    total = sum(len(plan.epoch(number)) for number in range(3))
    assert plan.num_steps(3) == total
    assert plan.num_steps(3, at_most=5) == 5
    assert plan.num_steps(3, at_most=10_000) == total


@pytest.mark.parametrize(
    ("num_held_out", "hyperparameters", "expected"),
    [
        (10, {}, 10),  # cheap: ten evaluations in 100 steps
        (90, {}, 20),  # 0.15 of the time of 100 steps pays for five evaluations
        (1000, {}, 34),  # at least three
        (1000, {"early_stopping": EarlyStopping()}, 10),
        (1000, {"eval_steps": 7}, 7),
    ],
)
def test_evaluations_take_a_small_share_of_the_time(
    num_held_out: int, hyperparameters: dict[str, object], expected: int
) -> None:
    plan = BatchPlan([10] * 1000, batch_tokens=100, seed=0)
    h = Hyperparameters.model_validate(hyperparameters)
    assert eval_steps_of(h, plan, 100, 10 * num_held_out) == expected


@pytest.mark.parametrize(
    ("device", "num_tokens", "num_processes", "expected"),
    [
        ("cpu", 10**9, 2, 1_024),
        ("cuda", 10**5, 1, 1_024),  # few rows: an epoch keeps its steps
        ("cuda", 10**6, 1, 5_000),
        ("cuda", 10**9, 1, 8_192),
        ("cuda", 10**9, 4, 4 * 8_192),
    ],
)
def test_automatic_batches_grow_with_the_rows_on_a_gpu(
    device: str, num_tokens: int, num_processes: int, expected: int
) -> None:
    automatic, requested = (
        batch_tokens_of(h, device=device, num_tokens=num_tokens, num_processes=num_processes)
        for h in (Hyperparameters(), Hyperparameters(batch_tokens=64))
    )
    assert (automatic, requested) == (expected, 64)


@pytest.mark.parametrize("micro_tokens", [None, 128, 200, 1_000])
def test_micro_batches_divide_a_batch_without_changing_it(micro_tokens: int | None) -> None:
    plain = BatchPlan(LENGTHS, batch_tokens=512, seed=3)
    plan = BatchPlan(LENGTHS, batch_tokens=512, seed=3, micro_tokens=micro_tokens)
    for batch in plan.epoch(1):
        pieces = plan.pieces(batch)
        assert [row for piece in pieces for row in piece] == batch
        assert all(max(LENGTHS[row] for row in p) * len(p) <= (micro_tokens or 512) for p in pieces)
        assert (len(pieces) == 1) or (micro_tokens or 512) < 512
    assert plan.epoch(1) == plain.epoch(1)
    assert plan.pieces([]) == []
