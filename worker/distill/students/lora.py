"""LoRA: low-rank adapters on a model's linear layers, merged into the weights on saving.

Source: Hu et al., arXiv:2106.09685.

An adapted layer keeps its name and its weight, and gets two small parameters. Its class is replaced
by one whose forward pass adds scale * B A x. Optimizers, checkpoints and the oneDNN layers
therefore need no special treatment.

Adapted weights are frozen, so on a GPU they can have the dtype of autocast. A step gives the same
results with them as with float32 weights, which autocast would round at every use. All other
parameters, including the adapters, are float32.

The `peft` package is not used because it renames every layer. It also unmerges adapters by
subtraction, which does not restore the exact weights.

R rank, I input features, O output features.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from app.contracts.distillation import Lora
from worker.cpu import OneDnnConv1D, OneDnnLinear, linear
from worker.distill.students.layer_dropping import layer_stacks
from worker.errors import CorruptCheckpoint

NAMES = ("lora_a_RI", "lora_b_OR")
ADAPTERS = "adapters.safetensors"  # in a checkpoint, beside the model folder with merged weights


class Adapted(nn.Module):
    """Mixin that adds LoRA adapters to a linear layer. It comes before the layer's base class."""

    plain: Any  # Any: the layer's original class, which is no base class of Adapted
    weight: Tensor
    lora_a_RI: nn.Parameter
    lora_b_OR: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if self.weight.dtype == self.lora_a_RI.dtype or torch.is_autocast_enabled(device):
            return self._adapted(x)
        # outside of the training step, such as in rollouts
        with torch.autocast(device, self.weight.dtype):
            return self._adapted(x).to(x.dtype)

    def _adapted(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out + self.lora_scale * linear(linear(x, self.lora_a_RI), self.lora_b_OR)

    def delta_like_weight(self) -> Tensor:
        """Returns what the adapters add to the weight, in the weight's layout."""
        delta_OI = self.lora_scale * (self.lora_b_OR @ self.lora_a_RI)
        return delta_OI.t() if isinstance(self, Conv1D) else delta_OI


class LoraLinear(Adapted, OneDnnLinear):
    """Linear layer with LoRA adapters."""

    plain = OneDnnLinear


class LoraConv1D(Adapted, OneDnnConv1D):
    """GPT-2's Conv1D layer, whose weight is [I, O], with LoRA adapters."""

    plain = OneDnnConv1D


def add_lora(
    model: PreTrainedModel, lora: Lora, *, seed: int, base_dtype: torch.dtype = torch.float32
) -> None:
    """Adds adapters to every linear layer inside the model's layers, and freezes all else.

    The head gets no adapters. B is initially zero, so the model's outputs do not change. The adapted
    weights are rounded to `base_dtype`. All other parameters and buffers become float32.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    stacks = tuple(f"{prefix}." for prefix in layer_stacks(model))
    for name, module in model.named_modules():
        if name.startswith(stacks) and isinstance(module, nn.Linear | Conv1D):
            _adapt(module, lora, generator, base_dtype)
    adapted = {module.weight for module in model.modules() if isinstance(module, Adapted)}
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point() and tensor not in adapted:
            tensor.data = tensor.data.float()


@contextmanager
def merged(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Context manager that merges the adapters into the weights, to save or serve the model.

    On exit the original weights and adapters are restored exactly. Merged weights are float32
    and on the CPU, because a GPU may have no room for them. A model without adapters is unchanged.
    """
    layers = [module for module in model.modules() if isinstance(module, Adapted)]
    weights = [layer.weight.data for layer in layers]
    adapters = [[layer._parameters[name] for name in NAMES] for layer in layers]
    try:
        for layer in layers:
            layer.weight.data = (layer.weight.data + layer.delta_like_weight().detach()).cpu()
            for name in NAMES:
                del layer._parameters[name]
            layer.__class__ = layer.plain
        yield model
    finally:
        for layer, weight, pair in zip(layers, weights, adapters, strict=True):
            layer.weight.data = weight
            layer._parameters.update(zip(NAMES, pair, strict=True))
            layer.__class__ = LoraConv1D if isinstance(layer, Conv1D) else LoraLinear


def lora_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the adapters by name. Together with the start they determine the student exactly."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith(NAMES)
    }


def saved_bytes(model: PreTrainedModel) -> int:
    """Returns the size of the model's file, whose merged weights are float32."""
    lowered = [module.weight for module in model.modules() if isinstance(module, Adapted)]
    added = sum(weight.numel() * torch.float32.itemsize - weight.nbytes for weight in lowered)
    return int(added + sum(parameter.nbytes for parameter in model.parameters()))


@torch.no_grad()
def load_lora_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Copies saved adapters into a model that `add_lora` has prepared.

    Raises CorruptCheckpoint if the names or shapes differ.
    """
    own = lora_tensors(model)
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in tensors.items()}:
        raise CorruptCheckpoint(
            "the adapters of the checkpoint do not match this student; submit the job again"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _adapt(
    module: Any, lora: Lora, generator: torch.Generator, base_dtype: torch.dtype
) -> None:  # Any: Conv1D is untyped
    layer: type[Adapted] = LoraConv1D if isinstance(module, Conv1D) else LoraLinear
    weight: Tensor = module.weight
    O, I = weight.t().shape if isinstance(module, Conv1D) else weight.shape  # noqa: E741
    a_RI = torch.empty(lora.rank, I)
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    b_OR = weight.new_zeros(O, lora.rank, dtype=torch.float32)
    module.__class__ = layer
    module.register_parameter("lora_a_RI", nn.Parameter(a_RI.to(weight.device)))
    module.register_parameter("lora_b_OR", nn.Parameter(b_OR))
    module.weight.data = weight.to(base_dtype)
    module.lora_scale = lora.alpha / lora.rank
