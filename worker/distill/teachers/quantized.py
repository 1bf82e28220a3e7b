"""Teachers whose linear layers are quantised by torchao when they are loaded.

Embeddings, norms and the LM head are not quantised. The formats:

- int8: one scale per output. Inputs of the matmuls are not rounded.
- int4: one scale and one zero point per group of weights. Inputs are not rounded. On a CPU, the
  packed layout is a prototype of torchao.
- fp8: one scale per output, and one per token for inputs. Only GPUs with FP8 matmuls have it.
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig, PreTrainedModel

from app.contracts.distillation import TeacherPrecision
from app.contracts.memory.teacher_weights import INT4_GROUP, QUANTIZED_MULTIPLES
from app.contracts.train_workers import (
    QUANTIZATION_PACKAGE,
    precision_needs,
    supported_precisions,
)
from worker.errors import UnsupportedPrecision
from worker.models.architectures import bare_model, model_class, read_config


def load_quantized(
    folder: Path, precision: TeacherPrecision, *, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Loads a model in eval mode and quantises its linear layers, one after the other.

    `dtype` is that of the other weights, and of the activations. Raises UnsupportedPrecision.
    """
    config = read_config(folder)
    check_precision(precision, config, device=device)
    from transformers import TorchAoConfig

    where = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    model: PreTrainedModel = model_class(config).from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=TorchAoConfig(format_of(precision, device)),
        device_map={"": where},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    return model.eval().requires_grad_(False)


def format_of(precision: TeacherPrecision, device: str) -> Any:  # Any: torchao may be missing
    """Returns torchao's configuration of a precision on a device."""
    from torchao import quantization as ao

    # otherwise torchao changes global settings of torch.compile
    plain = {"set_inductor_config": False}
    match precision:
        case "int8":
            return ao.Int8WeightOnlyConfig(**plain)
        case "int4" if device == "cpu":
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            return PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP, **plain)
        case "int4":
            # the only layout whose matmul is in PyTorch itself
            return ao.Int4WeightOnlyConfig(
                group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", **plain
            )
        case "fp8":
            return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), **plain)


def check_precision(precision: TeacherPrecision, config: PretrainedConfig, *, device: str) -> None:
    """Raises UnsupportedPrecision if a teacher on this device cannot be quantised as requested."""
    supported = supported_precisions(
        has_package=find_spec(QUANTIZATION_PACKAGE) is not None,
        capability=torch.cuda.get_device_capability() if device == "cuda" else None,
    )
    if precision not in supported:
        raise UnsupportedPrecision(
            f"a teacher on this worker's device ({device}) cannot be quantised to {precision}: it needs "
            f"{precision_needs(precision)}; leave teacher_precision out, or use another precision"
        )
    layers = quantizable_layers(bare_model(config))
    if not layers:
        raise UnsupportedPrecision(
            f"a {config.model_type} teacher cannot be quantised, because its layers are not nn.Linear; leave "
            "teacher_precision out"
        )
    multiple = QUANTIZED_MULTIPLES[precision]
    for name, layer in layers.items():
        widths = [layer.in_features, *([layer.out_features] if precision == "fp8" else [])]
        if any(width % multiple for width in widths):
            raise UnsupportedPrecision(
                f"{precision} needs layers whose widths are multiples of {multiple}, but {name} has "
                f"{layer.in_features} inputs and {layer.out_features} outputs; use int8, or leave teacher_precision out"
            )


def quantizable_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Returns the layers that are quantised: all linear layers, except those that share a weight.

    The LM head is never quantised. Attentions of GPT-2 and its MLPs have layers of another class.
    """
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def num_quantizable(model: PreTrainedModel) -> int:
    """Returns the number of weights that are quantised."""
    return sum(layer.weight.numel() for layer in quantizable_layers(model).values())


def stored_bytes(weight: torch.Tensor) -> int:
    """Returns the memory of a weight. That of a quantised one is the sum of its parts."""
    if not is_traceable_wrapper_subclass(weight):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(stored_bytes(getattr(weight, name)) for name in names)


def package_version(precision: TeacherPrecision) -> str:
    """Returns the version of the package that quantises. Rounding may differ between versions.

    Raises UnsupportedPrecision if the package is not installed.
    """
    try:
        return f"{QUANTIZATION_PACKAGE}-{version(QUANTIZATION_PACKAGE)}"
    except PackageNotFoundError:
        raise UnsupportedPrecision(
            f"a teacher on this worker cannot be quantised to {precision}: it needs {precision_needs(precision)}; "
            "leave teacher_precision out, or install what is missing"
        ) from None
