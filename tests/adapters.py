"""Folders with adapters, as checkpoints of LoRA students have them."""

from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from app.contracts.distillation import Lora
from app.contracts.messages import AdapterBase, ArtifactRef
from worker.distill.students.lora import adapter_format, lora_tensors
from worker.models.adapters import save_adapters


def save_adapted(
    model: PreTrainedModel,
    folder: Path,
    lora: Lora,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    start: ArtifactRef | None = None,
) -> Path:
    """Writes the configuration and the adapters of a model to a new folder."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    form = adapter_format(model, lora, AdapterBase(start=start, dtype=dtype))
    assert form is not None
    save_adapters(folder, lora_tensors(model), form)
    return folder
