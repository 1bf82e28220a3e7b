"""Forward passes in float32 through a model whose weights are stored in a smaller dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.distill.students.layer_dropping import layer_stacks


@contextmanager
def float32_parts(model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which every layer has float32 weights while it runs.

    The same holds for all modules outside the layers. The results are those of a float32 model, but
    only one part of it exists in float32 at a time.
    """
    handles = []
    for part in _parts(model):
        stored: dict[nn.Parameter, Tensor] = {}
        handles.append(part.register_forward_pre_hook(_raise_dtype(stored)))
        handles.append(part.register_forward_hook(_restore(stored), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: PreTrainedModel) -> Iterator[nn.Module]:
    layers = [layer for stack in layer_stacks(model) for layer in model.get_submodule(stack)]
    inside = {module for layer in layers for module in layer.modules()}
    yield from layers
    for module in model.modules():
        if module not in inside and any(True for _ in module.parameters(recurse=False)):
            yield module


def _raise_dtype(stored: dict[nn.Parameter, Tensor]) -> Any:  # Any: the type of torch's hooks
    def hook(module: nn.Module, inputs: object) -> None:
        """Replaces the weights by copies in float32."""
        for parameter in module.parameters():
            if parameter.dtype != torch.float32:
                stored[parameter] = parameter.data
                parameter.data = parameter.data.float()

    return hook


def _restore(stored: dict[nn.Parameter, Tensor]) -> Any:  # Any: the type of torch's hooks
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        """Restores the weights that were replaced."""
        for parameter, data in stored.items():
            parameter.data = data
        stored.clear()

    return hook
