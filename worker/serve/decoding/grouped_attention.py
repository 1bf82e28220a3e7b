"""Attention of queries that share key heads, without copies of the keys, under any mask.

With a mask, transformers repeats keys and values for every query head before it calls SDPA, because
SDPA would choose a slow kernel otherwise. Here the queries of one key head become rows of one
matrix, and the mask is repeated instead, which is smaller. Used on CUDA devices only: on a CPU,
Llama-like models run in `LlamaDecoder`.
"""

# N rows, H query heads, K key heads (H = K * G), Q tokens per row, W columns, D head width,
# R = G * Q queries per key head
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from worker.models.attention_masks import unread_sdpa_mask

NAME = "stillhouse_grouped"


def use_grouped_attention(model: nn.Module) -> None:
    """Makes `attend` the attention of a model whose query heads share key heads."""
    config: Any = model.config  # transformers is untyped here
    num_heads = getattr(config, "num_attention_heads", None)
    num_key_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if config._attn_implementation == "sdpa" and num_key_heads != num_heads:
        model.set_attn_implementation(NAME)  # type: ignore[operator]  # typed as a tensor


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **more: Any,
) -> tuple[Tensor, None]:  # Any: families pass different options
    """Returns attention [N, Q, H, D] of queries [N, H, Q, D] over keys and values [N, K, W, D]."""
    N, H, Q, D = query.shape
    K = key.shape[1]
    is_special = more.get("dropout") or more.get("position_bias") is not None
    if K == H or attention_mask is None or attention_mask.shape[1] != 1 or is_special:
        sdpa: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **more
        )
        return sdpa
    mask_N1RW = attention_mask if Q == 1 else attention_mask.repeat(1, 1, H // K, 1)
    query_NKRD = query.reshape(N, K, -1, D)
    out_NKRD = scaled_dot_product_attention(
        query_NKRD, key, value, attn_mask=mask_N1RW, scale=more.get("scaling")
    )
    return out_NKRD.reshape(N, H, Q, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, unread_sdpa_mask)
