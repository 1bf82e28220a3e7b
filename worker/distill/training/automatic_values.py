"""Values of a training that a job leaves to the service, each with its reason.

docs/automatic-values.md lists them for users.
"""

import math
from collections.abc import Iterator

from transformers import PreTrainedModel

from app.contracts.batch_plan import (
    CPU_BATCH_TOKENS,
    DEVICE_BATCH_TOKENS,
    EVAL_SHARE,
    MOST_EVALS,
    batch_tokens_of,
)
from app.contracts.distillation import Distillation, Hyperparameters
from worker.distill.decisions import Decision
from worker.distill.students.recipe import StudentRecipe
from worker.distill.teachers.signals import Signal
from worker.distill.training.checkpoint import TrainState
from worker.distill.training.devices import Device
from worker.protocol.run_lines import Sink

# Learning rates by the start of the student, with the reasons (bench/LOG.md).
FEW_LAYERS = (2e-3, "the student keeps at most a third of the layers, and they are not fitted")
LAYERS = (1e-3, "the student keeps more than a third of the layers, and they are not fitted")
CHECKPOINT = (1e-4, "the student starts from a whole model")
STARTS = {
    "fresh": (1e-3, "the student starts from random weights"),
    "width": (1e-3, "the student starts from a narrower copy"),
    "lora": (5e-4, "adapters are trained"),
}
# width that the defaults are tuned for; wider students get proportionally less
MEASURED_WIDTH = 576
# Learning rates of students with fitted layers. They are lower, because a high rate undoes the fit.
FITTED_FEW_LAYERS = 1e-3
# By version of the defaults: a checkpoint has its version, and a resumed job keeps its values.
FITTED_LAYERS = {1: 5e-4, 2: 2.5e-4, 3: 2.5e-4}
FOLLOWS_BATCH = 3  # from this version on, the rate follows the size of automatic batches
NEWEST_DEFAULTS = max(FITTED_LAYERS)


def peak_learning_rate(
    h: Hyperparameters, recipe: StudentRecipe, model: PreTrainedModel, state: TrainState
) -> float:
    """Returns the highest learning rate of the schedule: the requested one or the default."""
    if h.learning_rate != "auto":
        return h.learning_rate
    return float(decide_learning_rate(h, recipe, model, state).value)


def decide_for_student(
    h: Hyperparameters,
    recipe: StudentRecipe,
    model: PreTrainedModel,
    state: TrainState,
    *,
    eval_steps: int,
    total_steps: int,
) -> Iterator[Decision]:
    """Yields the decisions about the training of one student.

    On a GPU the size of a batch is among them, because it depends on the rows.
    """
    if h.learning_rate == "auto":
        yield decide_learning_rate(h, recipe, model, state)
    if h.batch_tokens == "auto" and model.device.type != "cpu":
        reason = "larger batches make a GPU faster, but an epoch should have many steps"
        yield decide_batch_tokens(state.batch_tokens or batch_tokens_of(h), reason)
    if h.eval_steps == "auto":
        yield decide_eval_steps(h, eval_steps, total_steps)


def decide_learning_rate(
    h: Hyperparameters, recipe: StudentRecipe, model: PreTrainedModel, state: TrainState
) -> Decision:
    """Returns the default of the highest learning rate, and the reason for it.

    It depends on how the student was made, on whether its layers were fitted, on its width, and on
    the size of automatic batches. A multiplier, if there is one, applies to the default.
    """
    rate, reason = STARTS.get(recipe.student.init, CHECKPOINT)
    if recipe.student.init == "layers" and recipe.layers is not None:
        is_few = 3 * len(recipe.layers) <= recipe.num_available
        rate, reason = FEW_LAYERS if is_few else LAYERS
        if state.num_fitted_layers:
            rate = FITTED_FEW_LAYERS if is_few else FITTED_LAYERS[state.defaults_version]
            reason = "the student starts from fitted layers"
    width = int(model.config.get_text_config(decoder=True).hidden_size)
    if width > MEASURED_WIDTH:
        rate *= MEASURED_WIDTH / width
        reason += f", and its width is {width}"
    if (factor := _batch_factor(h, state)) > 1:
        rate *= factor
        reason += f", and its batches have {state.batch_tokens:,} tokens"
    if h.learning_rate_multiplier is not None:
        rate *= h.learning_rate_multiplier
        reason += f"; the job multiplies it by {h.learning_rate_multiplier:g}"
    return Decision(
        option="hyperparameters.learning_rate",
        value=rate,
        reason=reason,
        words=f"learning rate {rate:.3g}",
    )


def _batch_factor(h: Hyperparameters, state: TrainState) -> float:
    """Returns the factor of the learning rate for automatic batches that are larger than a CPU's.

    The rates are measured with batches of a CPU. With Adam, the rate follows the square root of the
    batch size as long as the noise of the gradients dominates. It does not rise further beyond the
    largest batch of one GPU, because the best rate falls again for very large batches.

    Sources: Malladi et al., arXiv:2205.10287; Li et al., arXiv:2405.14578.
    """
    is_automatic = h.batch_tokens == "auto" and h.batch_rows is None
    if not is_automatic or state.defaults_version < FOLLOWS_BATCH:
        return 1.0
    num_tokens = min(state.batch_tokens or CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS)
    return math.sqrt(num_tokens / CPU_BATCH_TOKENS)


def decide_batch_tokens(number: int, reason: str) -> Decision:
    """Returns the decision for batches of this many tokens."""
    return Decision(
        option="hyperparameters.batch_tokens",
        value=number,
        reason=reason,
        words=f"batches of at most {number:,} tokens",
    )


def decide_eval_steps(h: Hyperparameters, eval_steps: int, total_steps: int) -> Decision:
    """Returns the decision for this number of steps between two evaluations."""
    num_evals = -(-total_steps // eval_steps)
    if eval_steps == 1:
        reason = "the training is short"
    elif h.early_stopping is not None:
        reason = "early stopping counts evaluations"
    elif num_evals >= MOST_EVALS:
        reason = f"they take at most {EVAL_SHARE:.0%} of the time"
    else:
        reason = f"more would take over {EVAL_SHARE:.0%} of the time"
    return Decision(
        option="hyperparameters.eval_steps",
        value=eval_steps,
        reason=reason,
        words=f"{num_evals} evaluations, one every {eval_steps} steps",
    )


def decide_for_job(block: Distillation, signal: Signal, card: Device) -> Iterator[Decision]:
    """Yields the decisions that apply to all students of a job."""
    h = block.hyperparameters
    if signal.reason != "requested":
        yield Decision(
            option="objective.teacher_signal",
            value=signal.name,
            reason=signal.reason,
            words=f"teacher signal {signal.name}",
        )
    if h.precision == "auto":
        name = "GPU" if card.name == "cuda" else "CPU"
        are = "are faster" if card.has_bfloat16 else "are not faster"
        yield Decision(
            option="hyperparameters.precision",
            value=card.precision,
            reason=f"bfloat16 matmuls {are} on this {name}",
            words=f"precision {card.precision}",
        )
    if h.batch_tokens == "auto" and card.name == "cpu":
        reason = "larger batches do not make a CPU faster"
        yield decide_batch_tokens(batch_tokens_of(h), reason)


def with_decisions(
    state: TrainState,
    block: Distillation,
    signal: Signal,
    card: Device,
    *,
    sink: Sink | None,
) -> TrainState:
    """Returns the state with the decisions of the job. A resumed job keeps those it has.

    `sink` receives an event per new decision. It is None for a resumed job, which has reported them
    unless an older version began it.
    """
    if state.decisions:
        return state
    decisions = tuple(decide_for_job(block, signal, card))
    if sink is not None:
        for decision in decisions:
            sink(decision.event())
    return state.model_copy(update={"decisions": decisions})
