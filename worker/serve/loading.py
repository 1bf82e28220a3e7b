"""Loads plain checkpoint folders: safetensors only, without code and without missing weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.contracts.generation import LoadedWeights
from worker.cpu import HAS_BFLOAT16, HAS_INT8, prepare_for_serving
from worker.serve.decoding.families import SEQ2SEQ, family_of, refuse_unlisted
from worker.serve.decoding.grouped_attention import use_grouped_attention
from worker.serve.errors import ModelLoadFailed, OptionUnavailable
from worker.serve.text.template_process import RENDERER


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to generate, its tokenizer, and the bytes of its weights."""

    model: nn.Module
    tokenizer: Any  # transformers is untyped here
    num_bytes: int


def load_model(
    folder: Path,
    *,
    device: str = "cpu",
    weights: LoadedWeights = "plain",
    keeps_plain: bool = True,
) -> LoadedModel:
    """Loads a model, on a CPU in float32 and elsewhere in the checkpoint's own dtype.

    Without plain weights, a model on a CPU takes half the memory, but only an engine can call it.
    Neither bfloat16 nor int8 weights keep them on a CPU. They take a half and a quarter of float32
    weights, and are faster on a CPU with instructions for them. The best logits are still computed
    in float32. Answers differ slightly (bench/LOG.md). Raises ModelLoadFailed, UnsupportedModel or
    OptionUnavailable.
    """
    from safetensors import SafetensorError

    # slow to import, needed for loading only
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    _refuse_unavailable(weights, device)
    refuse_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        refuse_unlisted(config)
        loader = AutoModelForSeq2SeqLM if config.model_type in SEQ2SEQ else AutoModelForCausalLM
        model, report = loader.from_pretrained(
            folder,
            dtype=torch.float32
            if device == "cpu"
            else torch.bfloat16
            if weights == "bfloat16"
            else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelLoadFailed(f"the model's files cannot be loaded: {error}") from error
    if tokenizer.chat_template:
        RENDERER.start()
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise ModelLoadFailed(
            f"the checkpoint lacks {len(lacking)} weights, including {lacking[0]}; import it again"
        )
    family_of(model)
    model.to(device).eval().requires_grad_(False)
    if device != "cpu":
        use_grouped_attention(model)
    num_packed_bytes = prepare_for_serving(model, weights, keeps_plain=keeps_plain)
    num_plain_bytes = sum(weight.nbytes for weight in model.parameters() if not weight.is_meta)
    return LoadedModel(model, tokenizer, num_plain_bytes + num_packed_bytes)


def _refuse_unavailable(weights: LoadedWeights, device: str) -> None:
    if weights == "int8" and (device != "cpu" or not HAS_INT8):
        raise OptionUnavailable(
            "int8 weights need a CPU and a PyTorch build with oneDNN; serve the model with other weights"
        )
    if weights == "bfloat16" and device == "cpu" and not HAS_BFLOAT16:
        raise OptionUnavailable(
            "this CPU does not support bfloat16 matmuls; serve the model with weights 'plain'"
        )


def refuse_code(folder: Path) -> None:
    """Raises ModelLoadFailed if a config in the folder names code (`auto_map`)."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        if path.exists() and "auto_map" in json.loads(path.read_text(encoding="utf-8")):
            raise ModelLoadFailed(
                f"{name} refers to custom code (auto_map), which is never run; import a model without it"
            )
