"""Steps between the evaluations of a training."""

from collections.abc import Sequence

from app.contracts.distillation import Hyperparameters
from worker.distill.data.batching import BatchPlan
from worker.distill.data.rows import Example

MOST_EVALS, FEWEST_EVALS = 10, 3
# Most time that evaluations take if there are more than FEWEST_EVALS, as a share of the training's.
EVAL_SHARE = 0.15
FORWARDS_PER_STEP = 3  # a step takes about as long as this number of forward passes


def eval_steps_of(
    h: Hyperparameters, plan: BatchPlan, total_steps: int, valid: Sequence[Example]
) -> int:
    """Returns the steps between two evaluations. For "auto" there are fewer with many held-out rows.

    Early stopping counts evaluations, so it always gets `MOST_EVALS`.
    """
    if h.eval_steps != "auto":
        return h.eval_steps
    num_epochs = total_steps / len(plan.epoch(0))
    num_trained = num_epochs * sum(plan.lengths)
    num_held_out = max(1, sum(example.num_tokens for example in valid))
    affordable = round(EVAL_SHARE * FORWARDS_PER_STEP * num_trained / num_held_out)
    num_evals = min(MOST_EVALS, max(FEWEST_EVALS, affordable))
    return max(1, -(-total_steps // (MOST_EVALS if h.early_stopping else num_evals)))
