"""Switches the layers of a model to the fast paths of this package, in place.

All functions work on any device. On devices other than a CPU, the replaced layers run PyTorch's own
operations.
"""

from typing import Any

import torch
from torch import nn

from app.contracts.generation import LoadedWeights
from worker.cpu.int8 import int8_kernels, quantize_weights
from worker.cpu.linear_ops import pack_weights, use_onednn
from worker.cpu.llama_decoder import fuse_projections, has_refined_head, is_llama_like
from worker.cpu.short_attention import use_short_attention
from worker.cpu.training_ops import use_training_ops


def prepare_for_training(
    model: Any,  # transformers is untyped here
    *,
    dtype: torch.dtype = torch.float32,
    exact: nn.Module | None = None,
    fuses_layers: bool = True,
) -> None:
    """Prepares a model that is trained.

    dtype: dtype to which linear layers round their operands. Sums, weights, gradients and the
        activations between layers stay float32.
    exact: Layer that rounds nothing, such as the LM head.
    fuses_layers: Also switches attention, norms and MLPs to fused operations.
    """
    use_onednn(model, dtype, exact=exact)
    if fuses_layers:
        _fuse_layers_and_attention(model)


def prepare_for_inference(
    model: Any,
    *,
    dtype: torch.dtype = torch.float32,
    exact: nn.Module | None = None,
    fuses_layers: bool = False,
) -> None:
    """Prepares a model that is called as a module, and is neither trained nor copied.

    Its linear layers get packed weights, beside the plain ones. See `prepare_for_training` for the
    arguments.
    """
    pack_weights(model, dtype=dtype, exact=exact)
    if fuses_layers:
        _fuse_layers_and_attention(model)


def fuse_layers(model: Any) -> None:
    """Switches norms and MLPs of a model to fused operations, for training and for inference."""
    use_training_ops(model)


def prepare_for_serving(model: Any, weights: LoadedWeights, *, keeps_plain: bool) -> int:
    """Prepares a model for an engine, and returns the bytes of its packed weights.

    Without plain weights, a Llama-like model on a CPU can only be called by `LlamaDecoder`.

    Rounding the LM head would affect every token. It is rounded only if its best logits can be
    computed again with the float32 weights.
    """
    if not keeps_plain and is_llama_like(model) and model.device.type == "cpu":
        fuse_projections(model)
    if weights == "plain":
        return pack_weights(model, keeps_plain=keeps_plain)
    head = model.get_output_embeddings()
    exact_weight, is_refined = head.weight, has_refined_head(model)
    if weights == "int8":
        is_refined = is_refined and int8_kernels(exact_weight.shape[1]) is not None
        num_bytes = quantize_weights(model, exact=None if is_refined else head)
        if not is_refined:
            num_bytes += pack_weights(model, keeps_plain=keeps_plain)
    else:
        exact = None if is_refined else head
        num_bytes = pack_weights(model, keeps_plain=False, dtype=torch.bfloat16, exact=exact)
    if is_refined:
        head.weight = exact_weight
    return num_bytes


def _fuse_layers_and_attention(model: Any) -> None:
    use_short_attention(model)
    use_training_ops(model)
