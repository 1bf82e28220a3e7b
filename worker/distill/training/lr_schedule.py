"""Learning-rate schedule, default learning rates, and weight-decay groups."""

import math

from transformers import PreTrainedModel

from app.contracts.distillation import Hyperparameters
from worker.distill.students.recipe import StudentRecipe

FEW_LAYERS_LEARNING_RATE = 2e-3  # for students that keep at most a third of the layers
LAYERS_LEARNING_RATE = 1e-3  # for students that keep more (bench/LOG.md)
FITTED_SHARE = 0.5  # of the two above, for fitted layers: a higher rate undoes the fit
FRESH_LEARNING_RATE = 1e-3
WIDTH_LEARNING_RATE = 1e-3
LORA_LEARNING_RATE = 5e-4
CHECKPOINT_LEARNING_RATE = 1e-4
STARTS = {"fresh": FRESH_LEARNING_RATE, "width": WIDTH_LEARNING_RATE, "lora": LORA_LEARNING_RATE}
# width that the defaults are tuned for; wider students get proportionally less
MEASURED_WIDTH = 576


def scheduled(step: int, total_steps: int, *, peak: float, warmup: float) -> float:
    """Returns the learning rate of a step: a linear warm-up, then a cosine decay to zero.

    It depends on the step alone, so that a resumed run follows the same curve.
    """
    num_warmup = math.ceil(warmup * total_steps)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    share = (step - num_warmup) / max(1, total_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def peak_learning_rate(
    h: Hyperparameters, recipe: StudentRecipe, model: PreTrainedModel, num_fitted_layers: int
) -> float:
    """Returns the highest learning rate of the schedule: the requested one or a default.

    The default depends on how the student was made, on whether its layers were fitted, and on its
    width. A multiplier, if there is one, applies to the default.
    """
    if h.learning_rate != "auto":
        return h.learning_rate
    rate = STARTS.get(recipe.student.init, CHECKPOINT_LEARNING_RATE)
    if recipe.student.init == "layers" and recipe.layers is not None:
        is_few = 3 * len(recipe.layers) <= recipe.num_available
        rate = FEW_LAYERS_LEARNING_RATE if is_few else LAYERS_LEARNING_RATE
        rate *= FITTED_SHARE if num_fitted_layers else 1.0
    rate *= h.learning_rate_multiplier or 1.0
    return rate * min(
        1.0, MEASURED_WIDTH / int(model.config.get_text_config(decoder=True).hidden_size)
    )


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, object]]:
    """Returns optimizer groups in which only matrices have weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
