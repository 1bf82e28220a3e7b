"""PyTorch operators for the training kernels, in the namespace `stillhouse`.

They have fake implementations and gradients, so that they can be traced, compiled and checked as
any other operator of PyTorch. They need the compiled kernels and contiguous float32 tensors on a
CPU; `worker.cpu.training_ops` and `worker.cpu.short_attention` call them where that is given.

Without gradients, callers use `Kernels` directly, which has less overhead.
"""

# B rows, T tokens, H query heads and K key heads of width D, E hidden size, W columns of weights;
# P is B, or 1 if all rows share positions
from typing import Any

import torch
from torch import Tensor

from worker.cpu.kernels.bindings import LANES, Kernels, kernels


def _ops() -> Kernels:
    found = kernels()
    assert found is not None, "the caller has checked that the kernels are there"
    return found


@torch.library.custom_op("stillhouse::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the RMS norm [..., E] times the weight, and the scale of each row [N]."""
    return _ops().norm(x, weight_E, eps)


@torch.library.custom_op("stillhouse::rms_norm_gradients", mutates_args=(), device_types="cpu")
def rms_norm_gradients(
    grad: Tensor, x: Tensor, weight_E: Tensor, scales_N: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the weight. The latter is empty if it is not needed."""
    grad_x, grad_weight_E = _ops().norm_gradients(
        grad, x, weight_E, scales_N, needs_weight=needs_weight
    )
    return grad_x, weight_E.new_empty(0) if grad_weight_E is None else grad_weight_E


@torch.library.custom_op("stillhouse::swiglu", mutates_args=(), device_types="cpu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up."""
    return _ops().swiglu(gate, up)


@torch.library.custom_op("stillhouse::swiglu_gradients", mutates_args=(), device_types="cpu")
def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and up."""
    return _ops().swiglu_gradients(grad, gate, up)


@torch.library.custom_op("stillhouse::rotate", mutates_args=(), device_types="cpu")
def rotate(x_BTHD: Tensor, cos_PTD: Tensor, sin_PTD: Tensor, is_back: bool) -> Tensor:
    """Applies rotary embeddings, or with `is_back` returns the gradient of their input."""
    return _ops().rotate(x_BTHD, cos_PTD, sin_PTD, is_back=is_back)


@torch.library.custom_op("stillhouse::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(
    query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Returns causal attention [B, T, H, D], and weights [B, H, T, W] for the gradients."""
    return _ops().attend_causally(query_BTHD, key_BTKD, value_BTKD, scaling)


@torch.library.custom_op(
    "stillhouse::causal_attention_gradients", mutates_args=(), device_types="cpu"
)
def causal_attention_gradients(
    grad_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    weights_BHTW: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of queries, keys and values."""
    operands = (query_BTHD, key_BTKD, value_BTKD)
    return _ops().attention_gradients(grad_BTHD, operands, weights_BHTW, scaling)


@rms_norm.register_fake
def _(x: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel() // weight_E.shape[0])


@rms_norm_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, weight_E: Tensor, scales_N: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight_E.new_empty(len(weight_E) if needs_weight else 0)


@swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@swiglu_gradients.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


@rotate.register_fake
def _(x_BTHD: Tensor, cos_PTD: Tensor, sin_PTD: Tensor, is_back: bool) -> Tensor:
    return torch.empty_like(x_BTHD)


@causal_attention.register_fake
def _(
    query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = query_BTHD.shape
    width = (T + LANES - 1) // LANES * LANES
    return torch.empty_like(query_BTHD), query_BTHD.new_empty(B, H, T, width)


@causal_attention_gradients.register_fake
def _(
    grad_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    weights_BHTW: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(query_BTHD),
        torch.empty_like(key_BTKD),
        torch.empty_like(value_BTKD),
    )


# In the functions below ctx is Any, because torch does not type what a context carries.


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight_E, _ = inputs
    ctx.save_for_backward(x, weight_E, output[1])


def _norm_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_weight = ctx.needs_input_grad[1]
    grad_x, grad_weight_E = rms_norm_gradients(grad.contiguous(), *ctx.saved_tensors, needs_weight)
    return grad_x, grad_weight_E if needs_weight else None, None


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = swiglu_gradients(grad.contiguous(), gate, up)
    return grad_gate, grad_up


def _keep_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos_PTD, sin_PTD, ctx.is_back = inputs
    ctx.save_for_backward(cos_PTD, sin_PTD)


def _rotate_backward(ctx: Any, grad_BTHD: Tensor) -> tuple[Tensor | None, ...]:
    return rotate(grad_BTHD.contiguous(), *ctx.saved_tensors, not ctx.is_back), None, None, None


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.scaling = inputs
    ctx.save_for_backward(*operands, output[1])


def _attention_backward(ctx: Any, grad_BTHD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = causal_attention_gradients(grad_BTHD.contiguous(), *ctx.saved_tensors, ctx.scaling)
    return (*grads, None)


rms_norm.register_autograd(_norm_backward, setup_context=_keep_norm)
swiglu.register_autograd(_swiglu_backward, setup_context=_keep_inputs)
rotate.register_autograd(_rotate_backward, setup_context=_keep_rotation)
causal_attention.register_autograd(_attention_backward, setup_context=_keep_attention)
