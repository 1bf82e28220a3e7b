"""Learning rates: their course over a training, their defaults, and which parameters decay."""

import math

from transformers import PreTrainedModel

from app.contracts.distillation import Hyperparameters
from worker.distill.students.recipe import StudentRecipe

FEW_LAYERS_LEARNING_RATE = 2e-3  # measured for 8 of 30 layers, width 576
LAYERS_LEARNING_RATE = 1e-3  # measured for 15 of 30
FITTED_SHARE = (
    0.5  # of those two for fitted layers: measured for both; more undoes what the fit did
)
FRESH_LEARNING_RATE = 1e-3
WIDTH_LEARNING_RATE = 1e-3
LORA_LEARNING_RATE = 5e-4
CHECKPOINT_LEARNING_RATE = 1e-4
STARTS = {"fresh": FRESH_LEARNING_RATE, "width": WIDTH_LEARNING_RATE, "lora": LORA_LEARNING_RATE}
MEASURED_WIDTH = 576  # wider students get less, in proportion


def scheduled(step: int, total_steps: int, *, peak: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; by step alone, so that a resumed run follows the same curve."""
    num_warmup = math.ceil(warmup * total_steps)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    share = (step - num_warmup) / max(1, total_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def peak_learning_rate(
    h: Hyperparameters, recipe: StudentRecipe, model: PreTrainedModel, num_fitted_layers: int
) -> float:
    if h.learning_rate != "auto":
        return h.learning_rate
    rate = STARTS.get(recipe.student.init, CHECKPOINT_LEARNING_RATE)
    if recipe.student.init == "layers" and recipe.layers is not None:
        is_few = 3 * len(recipe.layers) <= recipe.num_available
        rate = FEW_LAYERS_LEARNING_RATE if is_few else LAYERS_LEARNING_RATE
        rate *= FITTED_SHARE if num_fitted_layers else 1.0
    return rate * min(
        1.0, MEASURED_WIDTH / int(model.config.get_text_config(decoder=True).hidden_size)
    )


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, object]]:
    """Only matrices decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
