"""LoRA: low-rank adapters on a model's linear layers, merged into the weights after training.

Source: Hu et al., arXiv:2106.09685.

An adapted layer keeps its name and its weight, and gets two small parameters. Its class is replaced
by one whose forward pass adds scale * B A x. Optimizers, checkpoints and the oneDNN layers
therefore need no special treatment.

Adapted weights are frozen, so on a GPU they can have the dtype of autocast. A step gives the same
results with them as with float32 weights, which autocast would round at every use. All other
parameters, including the adapters, are float32.

Checkpoints hold the adapters without the weights. `plain_model` merges them
(docs/decisions/0024-checkpoints-of-adapters.md).

The `peft` package is not used because it renames every layer. It also unmerges adapters by
subtraction, which does not restore the exact weights.

R rank, I input features, O output features.
"""

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from app.contracts.distillation import Lora
from app.contracts.messages import AdapterBase, read_adapter_base
from worker.cpu import OneDnnConv1D, OneDnnLinear, linear
from worker.distill.students.layer_dropping import layer_stacks
from worker.errors import CorruptCheckpoint
from worker.models.adapters import NAMES, AdapterFormat, merge_adapters, read_adapters

# In checkpoints of older versions, beside a model folder with merged weights.
OLD_ADAPTERS = "adapters.safetensors"


class Adapted(nn.Module):
    """Mixin that adds LoRA adapters to a linear layer. It comes before the layer's base class."""

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


class LoraLinear(Adapted, OneDnnLinear):
    """Linear layer with LoRA adapters."""


class LoraConv1D(Adapted, OneDnnConv1D):
    """GPT-2's Conv1D layer, whose weight is [I, O], with LoRA adapters."""


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


def lora_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the adapters by name. Together with the start they determine the student exactly."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith(NAMES)
    }


def adapter_format(
    model: PreTrainedModel, lora: Lora | None, base: AdapterBase
) -> AdapterFormat | None:
    """Returns the properties of a student's adapters that are stored with them, None without."""
    if lora is None:
        return None
    is_transposed = any(isinstance(module, LoraConv1D) for module in model.modules())
    return AdapterFormat(lora, base, has_transposed_weights=is_transposed)


def plain_model(folder: Path, start_dir: Path, target: Path) -> Path:
    """Returns the folder of a student without adapters: `folder` itself if it has none.

    Otherwise it merges the adapters into the start model, and writes the result to `target`.
    """
    if read_adapter_base(folder) is None:
        return folder
    return merge_adapters(start_dir, folder, target)


def read_saved_adapters(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the adapters in a checkpoint of this version or an older one."""
    old = checkpoint / OLD_ADAPTERS
    return load_file(old) if old.exists() else read_adapters(checkpoint / "model")


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
