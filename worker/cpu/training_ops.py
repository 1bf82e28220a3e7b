"""RMS norms, gated MLPs and rotary embeddings for training: one compiled pass each way.

PyTorch needs several passes over the states for each of them (bench/LOG.md). Without kernels, or if
the dtype is not float32, a module runs its own forward method.

B rows, T tokens, H heads, D head width, E hidden size; P = B, or 1 if all rows share positions.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from app.contracts.architectures import ARCHITECTURES, Part
from worker.cpu.kernels import operators
from worker.cpu.kernels.bindings import Kernels, kernels
from worker.cpu.short_attention import NAME as SHORT_ATTENTION
from worker.cpu.short_attention import attend


def _classes_with(part: Part, suffix: str) -> set[str]:
    return {f"{a.classes}{suffix}" for a in ARCHITECTURES.values() if part in a.fused}


# these compute weight * x / sqrt(mean(x^2) + variance_epsilon) and nothing more
RMS_NORMS = {*_classes_with("norms", "RMSNorm"), "T5LayerNorm"}
# these compute down(act(gate(x)) * up(x)) and nothing more
GATED_MLPS = _classes_with("mlp", "MLP")
# these have projections, a rotation over the full head width, attention and an output projection
ATTENTIONS = _classes_with("attention", "Attention")


def use_training_ops(model: PreTrainedModel) -> None:
    """Replaces the forward methods of a model's norms, gated MLPs and attentions by compiled ones.

    Only the classes that are listed in this module are changed.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind in RMS_NORMS:
            module.forward = MethodType(_norm, module)
        elif kind in GATED_MLPS and isinstance(module.act_fn, nn.SiLU | SiLUActivation):
            module.forward = MethodType(_gated_mlp, module)
        elif kind in ATTENTIONS:
            module.forward = MethodType(_attention, module)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:  # Any: each family has its own class
    if (ops := _kernels_for(hidden_states)) is None:
        return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
    norm = operators.rms_norm if torch.is_grad_enabled() else ops.norm
    normed, _ = norm(hidden_states.contiguous(), self.weight, self.variance_epsilon)
    return normed


def _gated_mlp(self: Any, x: Tensor) -> Tensor:
    if (ops := _kernels_for(x)) is None:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    swiglu = operators.swiglu if torch.is_grad_enabled() else ops.swiglu
    middle = swiglu(self.gate_proj(x).contiguous(), self.up_proj(x).contiguous())
    return self.down_proj(middle)  # type: ignore[no-any-return]


def _attention(
    self: Any, hidden_states: Tensor, *others: Any, **more: Any
) -> tuple[Tensor, Tensor | None]:
    positions = more.get("position_embeddings")
    is_stored = more.get("cache") is not None or more.get("past_key_values") is not None
    is_known = (
        not others
        and not is_stored
        and positions is not None
        and positions[0].shape[-1] == self.head_dim
    )
    is_known = is_known and self.config._attn_implementation == SHORT_ATTENTION
    if not is_known or (ops := _kernels_for(hidden_states)) is None:
        return type(self).forward(self, hidden_states, *others, **more)  # type: ignore[no-any-return]
    shape_BTHD = (*hidden_states.shape[:-1], -1, self.head_dim)
    cos_PTD, sin_PTD = (angles.contiguous() for angles in positions)  # type: ignore[union-attr]
    unrotated = (project(hidden_states).view(shape_BTHD) for project in (self.q_proj, self.k_proj))
    rotate = partial(operators.rotate, is_back=False) if torch.is_grad_enabled() else ops.rotate
    query, key = (
        rotate(x_BTHD.contiguous(), cos_PTD, sin_PTD).transpose(1, 2) for x_BTHD in unrotated
    )
    value = self.v_proj(hidden_states).view(shape_BTHD).transpose(1, 2)
    dropout = self.attention_dropout if self.training else 0.0
    mask = more.get("attention_mask")
    out_BTHD, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout)
    return self.o_proj(out_BTHD.reshape(*hidden_states.shape[:-1], -1)), None


def _kernels_for(x: Tensor) -> Kernels | None:
    is_float32 = x.dtype == torch.float32 and x.device.type == "cpu"
    return kernels() if is_float32 and not torch.is_autocast_enabled("cpu") else None
