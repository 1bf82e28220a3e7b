"""Activation checkpointing: layers keep only their input, and run again in the backward pass.

The switch of transformers has no effect here: it needs a model in training mode, and students stay
in eval mode, so that dropout stays off.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from worker.distill.students.layer_dropping import layer_stacks


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes all layers of a model run again in the backward pass, except the last of each stack.

    The last layer of a decoder runs its MLP at the target positions only. The hooks that do so are
    gone in the backward pass (worker.distill.forward.hidden_states). Little is lost, because the
    backward pass begins with that layer.
    """
    for name in layer_stacks(model):
        stack = model.get_submodule(name)
        assert isinstance(stack, nn.ModuleList)
        for layer in list(stack)[:-1]:
            layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # Any: each family has its own arguments and results

    def run(*args: Any, **options: Any) -> Any:
        """Runs the layer. Without a gradient nothing is kept, so nothing is run again."""
        # a model without dropout needs no random state
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return run
