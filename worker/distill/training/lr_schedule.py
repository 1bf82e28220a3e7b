"""Learning-rate schedule, and weight-decay groups."""

import math

from transformers import PreTrainedModel


def scheduled(step: int, total_steps: int, *, peak: float, warmup: float) -> float:
    """Returns the learning rate of a step: a linear warm-up, then a cosine decay to zero.

    It depends on the step alone, so that a resumed run follows the same curve.
    """
    num_warmup = math.ceil(warmup * total_steps)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    share = (step - num_warmup) / max(1, total_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, object]]:
    """Returns optimizer groups in which only matrices have weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
