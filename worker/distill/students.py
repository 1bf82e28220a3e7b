"""Where the student comes from: layers copied out of the teacher, or a checkpoint as it is."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from app.distillation import Student
from worker.distill.errors import StudentTooDeep, UnsupportedModel

SUPPORTED = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class StudentRecipe:
    """The student of a run, fit to be built again: `layers` are those kept of `num_available`, None for a checkpoint."""

    start_dir: Path
    layers: tuple[int, ...] | None
    freeze_head: bool
    num_available: int

    def build(self) -> PreTrainedModel:
        """The untrained student, in float32 and without dropout."""
        model = load_model(self.start_dir)
        return model if self.layers is None else keep_layers(model, self.layers)


def plan_student(teacher_dir: Path, start_dir: Path, student: Student) -> StudentRecipe:
    """Which layers are kept, checked against the model that they are taken from.

    A checkpoint's head is only frozen where it is the teacher's own, since `freeze_head` speaks of a copied head.
    Raises UnsupportedModel, StudentTooDeep.
    """
    available = int(read_config(start_dir).num_hidden_layers)
    if student.init == "checkpoint":
        is_copied = start_dir.resolve() == teacher_dir.resolve() or _have_one_head(teacher_dir, start_dir)
        return StudentRecipe(start_dir, None, student.freeze_head and is_copied, available)
    wanted = student.layers or first_and_last(available, student.num_layers or max(1, available // 2))
    if len(wanted) > available or max(wanted) >= available:
        raise StudentTooDeep(
            f"student.layers asks for {len(wanted)} layers up to number {max(wanted)}, but the model it starts from has "
            f"{available} (0 to {available - 1}); ask for fewer"
        )
    return StudentRecipe(start_dir, tuple(wanted), student.freeze_head, available)


def first_and_last(num_available: int, num_kept: int) -> tuple[int, ...]:
    """The first half and the last half, the odd one going to the first: the best start of those measured.

    Raises StudentTooDeep if more layers are wanted than there are.
    """
    if num_kept > num_available:
        raise StudentTooDeep(
            f"student.num_layers is {num_kept}, but the model it starts from has {num_available}; ask for fewer"
        )
    num_first = -(-num_kept // 2)
    return (*range(num_first), *range(num_available - (num_kept - num_first), num_available))


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a supported causal LM. Raises UnsupportedModel."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if config.model_type not in SUPPORTED:
        raise UnsupportedModel(
            f"the model has architecture {config.model_type!r}; supported are {', '.join(SUPPORTED)}"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModel(
            "scale_attn_by_inverse_layer_idx is not supported: a layer's number changes its output"
        )
    return config


def load_model(folder: Path) -> PreTrainedModel:
    """A causal LM in float32, in eval mode, which also keeps its dropout out of training."""
    read_config(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return model.eval()


def keep_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of the same family that holds copies of the given layers and of everything that is not a layer."""
    prefix = _layers_prefix(teacher)
    inside = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    new_number = {old: new for new, old in enumerate(layers)}
    weights = {}
    for name, tensor in teacher.state_dict().items():
        found = inside.match(name)
        if found is None:
            weights[name] = tensor
        elif (old := int(found[1])) in new_number:
            weights[f"{prefix}.{new_number[old]}.{name[found.end() :]}"] = tensor
    student: PreTrainedModel = AutoModelForCausalLM.from_config(
        _cut(teacher.config, layers), dtype=torch.float32
    )
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def freeze_head(model: PreTrainedModel) -> None:
    """Leaves the head, and the embedding tied to it, as they are."""
    model.get_output_embeddings().requires_grad_(False)


def body_of(model: PreTrainedModel) -> nn.Module:
    """The transformer without its head; its last hidden state is the head's input."""
    body: nn.Module = model.base_model
    return body


def context_tokens(config: PretrainedConfig) -> int:
    """The longest sequence the positions allow."""
    return int(config.max_position_embeddings)


def num_parameters(model: PreTrainedModel) -> int:
    """Parameters, those shared counted once."""
    return sum(p.numel() for p in model.parameters())


def _cut(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    num_layers = int(config.num_hidden_layers)
    values: dict[str, Any] = config.to_dict()  # Any: open-ended JSON
    for name, value in values.items():
        if isinstance(value, list) and len(value) == num_layers and name in ("layer_types", "no_rope_layers"):
            values[name] = [value[i] for i in layers]
    values[type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    return type(config).from_dict(values)


def _layers_prefix(model: PreTrainedModel) -> str:
    num_layers = int(model.config.num_hidden_layers)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.count(".") == 1
    ]
    if len(found) != 1:
        raise UnsupportedModel(f"cannot tell the layers of a {model.config.model_type} model apart")
    return str(found[0])


def _have_one_head(one: Path, other: Path) -> bool:
    heads = [load_model(folder).get_output_embeddings().weight for folder in (one, other)]
    return heads[0].shape == heads[1].shape and bool(torch.equal(*heads))
