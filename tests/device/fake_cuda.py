"""Runs code that believes in a CUDA device on a machine without one.

Tensors have shapes, dtypes and devices, but no values (FakeTensorMode). Operations between devices
fail as they would on a GPU. What the mode cannot detect:

- A tensor without dimensions on the CPU passes everywhere. So do CPU tensors that are indexed with
  CUDA indices.
- Values: a loss is never NaN here, and no kernel runs.
- Speed and fragmentation. Attention takes the plain path, so its scores are allocated.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

GIB = 2**30
PINNED = "is_pinned_by_test"  # attribute of a fake tensor that stands for one in pinned memory


@contextmanager
def fake_cuda(*, free_bytes: int = 72 * GIB, has_bfloat16: bool = True) -> Iterator[None]:
    """Pretends within the block that there is one CUDA device, and makes all tensors fake.

    Models are built from their configurations: weights are not read from files.
    """
    answers: dict[str, Any] = {  # Any: functions of torch.cuda with different results
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_device_name": "a pretended card",
        "mem_get_info": (free_bytes, 80 * GIB),
        "is_bf16_supported": has_bfloat16,
    }
    mode = FakeTensorMode()  # before `is_available` is patched, so that it initialises no device
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, _returning(answer)))
        # without this, autocast only warns, and the block runs in float32
        stack.enter_context(
            patch("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", _no)
        )
        stack.enter_context(patch.object(Tensor, "pin_memory", _pinned))
        stack.enter_context(patch.object(PreTrainedModel, "from_pretrained", _from_config))
        for kind in (nn.Module, PreTrainedModel):
            stack.enter_context(patch.object(kind, "to", _moved))
        # transformers reads no masks of tensors that it knows to be fake, but those of a GPU
        stack.enter_context(
            patch("transformers.utils.import_utils.is_fake_tensor", _returning(False))
        )
        stack.enter_context(mode)
        yield


def _returning(answer: Any) -> Any:
    return lambda *args, **options: answer


def _no() -> bool:
    return False


def _pinned(tensor: Tensor) -> Tensor:
    # not a copy: the copy of a single number would be a real tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype)
    setattr(pinned, PINNED, True)
    return pinned


@classmethod  # type: ignore[misc]  # becomes a method of PreTrainedModel
def _from_config(
    cls: Any, folder: Any, *, config: Any, dtype: torch.dtype, **options: Any
) -> Any:  # Any: transformers is untyped here
    return cls._from_config(config, dtype=dtype)


def _moved(model: nn.Module, device: str | torch.device) -> nn.Module:
    """Moves a module. A fake parameter cannot change its device, so all are replaced.

    An `OpLog` sees no copies, because to load a model is no wait of interest.
    """
    moved: dict[Tensor | None, Any] = {None: None}  # tied parameters stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in moved:
                there = torch.empty_like(parameter.detach(), device=device)
                moved[parameter] = nn.Parameter(there, parameter.requires_grad)
            module._parameters[name] = moved[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = (
                None if buffer is None else torch.empty_like(buffer, device=device)
            )
    return model
