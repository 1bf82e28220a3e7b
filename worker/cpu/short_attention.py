"""Attention over short sequences for training on a CPU, with full score matrices.

PyTorch's fused CPU kernel works block by block, which is slow for the short sequences of a
distillation. Plain matmuls are faster, and they need no copies of shared key heads. For causal
layers a C kernel (kernels/causal_attention.c) also skips the masked scores. bench/LOG.md has the
timings.

B batch, H query heads, K key heads (H = K * G), T queries, S keys, D head width. M = B * K matrices
of N = G * T stacked queries.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from worker.cpu.kernels import operators
from worker.cpu.kernels.bindings import LANES, kernels
from worker.models.attention_masks import unread_sdpa_mask

NAME = "stillhouse_short"
MOST_KEYS = 256  # the backward pass keeps the score matrices; longer ones take too much memory


Way = Callable[[Tensor, Tensor, Tensor, float], Tensor]
_WAY: ContextVar[Way | None] = ContextVar("way", default=None)


@contextmanager
def attending(way: Way) -> Iterator[None]:
    """Context manager in which `attend` calls `way` for this thread, and ignores masks.

    `way` takes queries, keys and values [B, H or K, T, D] and the scaling; it returns [B, T, H, D].
    """
    token = _WAY.set(way)
    try:
        yield
    finally:
        _WAY.reset(token)


def use_short_attention(model: PreTrainedModel) -> None:
    """Makes `attend` the attention function of the model, if the model uses SDPA.

    `attend` itself calls SDPA on other devices than a CPU.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **more: Any,
) -> tuple[Tensor, None]:  # Any: families pass different options
    """Returns attention [B, T, H, D] of queries [B, H, T, D] over keys and values [B, K, S, D].

    Registered as an attention function of transformers. Calls SDPA where `_is_short` is false.
    """
    scaling = more.get("scaling") or query.shape[-1] ** -0.5
    if (way := _WAY.get()) is not None:
        return way(query, key, value, scaling), None
    if not _is_short(query, key, attention_mask, more):
        sdpa: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **more
        )
        return sdpa
    is_causal = more.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None and is_causal and _has_kernels_for(query, key, value):
        operands = (each.transpose(1, 2).contiguous() for each in (query, key, value))
        attended, _ = operators.causal_attention(*operands, scaling)
        return attended, None
    hidden_TS = None
    if attention_mask is not None:
        hidden_TS = ~attention_mask
    elif is_causal and query.shape[2] > 1:
        hidden_TS = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    # torch leaves apply untyped
    out: Tensor = _Attention.apply(query, key, value, hidden_TS, scaling)  # type: ignore[no-untyped-call]
    return out, None


def _is_short(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, more: dict[str, Any]
) -> bool:
    is_plain = (
        not more.get("dropout") and more.get("position_bias") is None and not more.get("softcap")
    )
    has_plain_mask = attention_mask is None or (
        attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    )
    return (
        is_plain
        and has_plain_mask
        and torch.is_grad_enabled()
        and query.dtype == torch.float32
        and query.device.type == "cpu"
        and key.shape[2] <= MOST_KEYS
        and not torch.is_autocast_enabled("cpu")
    )


def _has_kernels_for(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Returns whether there are compiled kernels and they support this layer.

    They need as many keys as queries, and values as wide as queries. The head width must be a
    multiple of 16, and H a multiple of K.
    """
    is_own = query.shape[2] == key.shape[2] and query.shape[-1] == value.shape[-1]
    is_known = is_own and query.shape[-1] % LANES == 0 and query.shape[1] % key.shape[1] == 0
    return is_known and kernels() is not None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # ctx is Any: torch does not type what a context carries
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float
    ) -> Tensor:
        """Returns the attention [B, T, H, D]."""
        attended = attention(query, key, value, hidden, scaling)
        ctx.save_for_backward(*attended.saved)
        ctx.scaling, ctx.query_shape = scaling, attended.query_shape
        return attended.out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of queries, keys and values."""
        attended = Attended(grad_BTHD, ctx.saved_tensors, ctx.query_shape)
        return (*attention_gradients(attended, grad_BTHD, ctx.scaling), None, None)


class Attended(NamedTuple):
    """Output of an attention, and what its gradients need.

    `saved` holds queries, keys, values and weights, with the heads of a group stacked.
    """

    out_BTHD: Tensor
    saved: Sequence[Tensor]
    query_shape: torch.Size


def attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float
) -> Attended:
    """Returns attention of [B, H, T, D] over [B, K, S, D], without autograd.

    `hidden` is true for keys that a query must not see. Queries that share a key head are stacked
    into one matrix.
    """
    B, H, T, D = query.shape
    K, S = key.shape[1:3]
    query_MND = query.reshape(B * K, H // K * T, D)
    key_MSD, value_MSD = key.reshape(B * K, S, D), value.reshape(B * K, S, -1)
    scores_MNS = _scaled(query_MND, key_MSD.transpose(1, 2), scaling)
    if hidden is not None:
        scores_BHTS = scores_MNS.view(B, H, T, S)
        scores_BHTS.masked_fill_(hidden, torch.finfo(scores_BHTS.dtype).min)
    weights_MNS = torch.softmax(scores_MNS, dim=-1)
    out_BTHD = torch.bmm(weights_MNS, value_MSD).view(B, H, T, -1).transpose(1, 2).contiguous()
    return Attended(out_BTHD, (query_MND, key_MSD, value_MSD, weights_MNS), query.shape)


def attention_gradients(
    attended: Attended, grad_BTHD: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of queries, keys and values, in their shapes."""
    query_MND, key_MSD, value_MSD, weights_MNS = attended.saved
    B, H, T, D = attended.query_shape
    M, S = key_MSD.shape[:2]
    grad_MND = grad_BTHD.transpose(1, 2).reshape(M, -1, value_MSD.shape[-1])
    grad_value_MSD = torch.bmm(weights_MNS.transpose(1, 2), grad_MND)
    grad_weights_MNS = torch.bmm(grad_MND, value_MSD.transpose(1, 2))
    grad_scores_MNS = torch.ops.aten._softmax_backward_data(
        grad_weights_MNS, weights_MNS, -1, weights_MNS.dtype
    )
    grad_query_MND = _scaled(grad_scores_MNS, key_MSD, scaling)
    grad_key_MSD = _scaled(grad_scores_MNS.transpose(1, 2), query_MND, scaling)
    return (
        grad_query_MND.view(B, H, T, D),
        grad_key_MSD.view(B, M // B, S, D),
        grad_value_MSD.view(B, M // B, S, -1),
    )


def _scaled(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns scaling * (a @ b) per batch entry, without a separate pass for the scaling."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scaling)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, unread_sdpa_mask)
