import pytest

from app.contracts.distillation import EarlyStopping, Hyperparameters
from worker.distill.data.batching import BatchPlan
from worker.distill.data.rows import Example
from worker.distill.training.intervals import eval_steps_of


def held_out(num_rows: int) -> list[Example]:
    return [Example(token_ids=(1,) * 10, spans=((9, 10),))] * num_rows


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
    assert eval_steps_of(h, plan, 100, held_out(num_held_out)) == expected
