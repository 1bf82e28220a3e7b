"""Files of LoRA adapters, and the merge of adapters into the weights of their start model.

The files have the layout of the `peft` package, so that it can load a downloaded checkpoint.

R rank, I input features, O output features.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.contracts.distillation import Lora
from app.contracts.messages import ADAPTER_BASE, AdapterBase, read_adapter_base
from worker.errors import CorruptCheckpoint
from worker.models.artifact_checks import DTYPE_BYTES, read_safetensors_header, weight_files

TENSORS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
NAMES = ("lora_a_RI", "lora_b_OR")
PEFT_NAMES = ("lora_A.weight", "lora_B.weight")
PEFT_PREFIX = "base_model.model."
INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FLOATS = frozenset(DTYPE_NAMES.values())


@dataclass(frozen=True)
class AdapterFormat:
    """Properties of adapters that a checkpoint records besides their values.

    has_transposed_weights: The adapted layers are GPT-2's, whose weights are [I, O].
    """

    lora: Lora
    base: AdapterBase
    has_transposed_weights: bool


def save_adapters(folder: Path, adapters: Mapping[str, Tensor], form: AdapterFormat) -> None:
    """Writes adapters into an existing folder. Their names are `{layer}.lora_a_RI` and `_b_OR`."""
    tensors = {}
    for name, tensor in adapters.items():
        layer, _, kind = name.rpartition(".")
        key = f"{PEFT_PREFIX}{layer}.{PEFT_NAMES[NAMES.index(kind)]}"
        tensors[key] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": form.lora.rank,
        "lora_alpha": form.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": form.has_transposed_weights,
        "target_modules": sorted({name.rpartition(".")[0] for name in adapters}),
        "inference_mode": True,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    (folder / ADAPTER_BASE).write_text(form.base.model_dump_json())


def read_adapters(folder: Path) -> dict[str, Tensor]:
    """Returns the adapters in a folder, with the names that `save_adapters` takes."""
    tensors = {}
    for key, tensor in load_file(folder / TENSORS).items():
        layer, dot, kind = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        tensors[f"{layer}.{NAMES[PEFT_NAMES.index(dot[1:] + kind)]}"] = tensor
    return tensors


@torch.no_grad()
def merge_adapters(start_dir: Path, adapters_dir: Path, target: Path) -> Path:
    """Writes the plain model of adapters and their start model to `target`, and returns it.

    Tensors are read, merged and written one after the other, on the CPU. All that is not a weight
    is copied from `adapters_dir`. `target` is replaced at the end, so it is complete if it exists.

    Raises CorruptCheckpoint if the adapters do not match the start model.
    """
    base = read_adapter_base(adapters_dir)
    assert base is not None
    dtype: torch.dtype = getattr(torch, base.dtype)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    ours = shutil.ignore_patterns(TENSORS, SETTINGS, ADAPTER_BASE)
    shutil.copytree(adapters_dir, partial, ignore=ours)
    layers = _Layers(adapters_dir)
    num_bytes = sum(
        _merge_file(path, partial / path.name, layers, dtype) for path in weight_files(start_dir)
    )
    if layers.missing:
        raise CorruptCheckpoint(
            f"the start model has no weights for {len(layers.missing)} of the adapters, including "
            f"{min(layers.missing)}; submit the job again"
        )
    _change_json(partial / "config.json", dtype=base.dtype)
    if (start_dir / INDEX).exists():
        index = json.loads((start_dir / INDEX).read_text())
        index["metadata"] = {**index.get("metadata", {}), "total_size": num_bytes}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


class _Layers:
    """The adapters in a folder. `missing` has the names of layers that have not been merged."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / SETTINGS).read_text())
        self.is_transposed: bool = settings["fan_in_fan_out"]
        self.scale: float = settings["lora_alpha"] / settings["r"]
        self.tensors = read_adapters(folder)
        self.missing = {name.rpartition(".")[0] for name in self.tensors}

    def merged(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns a weight in `dtype`, with the adapters of its layer if it has any."""
        weight, layer = weight.to(dtype), name.removesuffix(".weight")
        if layer not in self.missing or layer == name:
            return weight
        self.missing.remove(layer)
        a_RI, b_OR = (self.tensors[f"{layer}.{kind}"] for kind in NAMES)
        delta_OI = self.scale * (b_OR @ a_RI)
        return (weight + (delta_OI.t() if self.is_transposed else delta_OI)).to(dtype)


def _merge_file(source: Path, target: Path, layers: _Layers, dtype: torch.dtype) -> int:
    """Writes a file with the tensors of `source`, and returns the bytes of its tensors."""
    entries, end = {}, 0
    headers = read_safetensors_header(source)
    for name, stored in headers.items():
        dtype_name = DTYPE_NAMES[dtype] if stored.dtype in FLOATS else stored.dtype
        begin, end = end, end + stored.num_elements * DTYPE_BYTES[dtype_name]
        entries[name] = {
            "dtype": dtype_name,
            "shape": stored.shape,
            "data_offsets": (begin, end),
        }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"))
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in _merged_tensors(source, headers, layers, dtype):
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return end


def _merged_tensors(
    source: Path, headers: Mapping[str, object], layers: _Layers, dtype: torch.dtype
) -> Iterator[Tensor]:
    with safe_open(source, framework="pt") as file:
        for name in headers:
            tensor = file.get_tensor(name)
            yield layers.merged(name, tensor, dtype) if tensor.dtype in DTYPE_NAMES else tensor


def _change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")
