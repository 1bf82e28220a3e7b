"""Queries, keys and values of a layer in any model family, and the relation loss of MiniLMv2.

B batch, P aligned positions of a row, N those of all rows, D width of all heads together, A relation
heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.errors import UnsupportedModel

# module names of separate layers for queries, keys and values
APART = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),  # BERT, RoBERTa
    ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),  # T5
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),  # Llama-like models, OPT, BART
)
# fused layer of GPT-2, whose output holds all queries, then all keys, then all values
IN_THIRDS = "attn.c_attn"
# fused layers of BLOOM and NeoX, whose output holds query, key and value of one head after another
BY_HEAD = ("self_attention.query_key_value", "attention.query_key_value")
# fused layer of Phi-3, whose output holds all queries, then all keys, then all values; it has fewer
# key heads than query heads
WITH_SHARED_KEYS = "self_attn.qkv_proj"
NO_KEY = -1e9  # score of a masked key; finite, so that the difference of two such scores is not NaN


@dataclass(frozen=True)
class SelfAttention:
    """Linear layers that compute queries, keys and values, before norms and rotations."""

    modules: tuple[nn.Module, ...]
    # heads of a fused layer, or 1 if its output is in thirds; None for separate layers
    num_fused_heads: int | None = None
    # widths of queries, keys and values in a fused layer with shared key heads
    fused_widths: tuple[int, int, int] | None = None

    def split(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Splits the outputs of the modules into queries, keys and values, [..., D] each.

        Shared key heads are not repeated.
        """
        if self.fused_widths is not None:
            queries, keys, values = torch.split(outputs[0], list(self.fused_widths), dim=-1)
            return queries, keys, values
        if self.num_fused_heads is None:
            queries, keys, values = outputs
            return queries, keys, values
        fused = outputs[0]
        by_head = fused.view(*fused.shape[:-1], self.num_fused_heads, 3, -1)
        queries, keys, values = (part.flatten(-2) for part in by_head.unbind(-2))
        return queries, keys, values

    @property
    def widths(self) -> set[int]:
        """Widths of the queries, keys and values."""
        if self.fused_widths is not None:
            return set(self.fused_widths)
        if self.num_fused_heads is not None:
            return {_width(self.modules[0]) // 3}
        return {_width(module) for module in self.modules}


def self_attention(layer: nn.Module, num_heads: int) -> SelfAttention:
    """Returns the query, key and value layers of a layer of any supported family.

    Raises UnsupportedModel if they cannot be found.
    """
    modules: dict[str, Any] = dict(layer.named_modules())  # Any: each family has its own classes
    for names in APART:
        if all(name in modules for name in names):
            return SelfAttention(tuple(modules[name] for name in names))
    for name, num_fused_heads in ((IN_THIRDS, 1), *((name, num_heads) for name in BY_HEAD)):
        if name in modules:
            return SelfAttention((modules[name],), num_fused_heads)
    if WITH_SHARED_KEYS in modules:
        fused, attention = modules[WITH_SHARED_KEYS], modules["self_attn"]
        key_width = attention.num_key_value_heads * attention.head_dim
        query_width = _width(fused) - 2 * key_width
        return SelfAttention((fused,), fused_widths=(query_width, key_width, key_width))
    raise UnsupportedModel(
        f"cannot find the queries, keys and values of a {type(layer).__name__}; leave objective.attention out"
    )


def choose_relation_heads(asked: int | None, teacher_heads: int, widths: set[int]) -> int:
    """Returns the number of relation heads, which must divide every width.

    By default it is the largest number that divides the teacher's heads and all widths. Raises
    UnsupportedModel if `asked` does not divide a width.
    """
    if asked is None:
        return math.gcd(teacher_heads, *widths)
    if any(width % asked for width in widths):
        raise UnsupportedModel(
            f"objective.attention.num_relation_heads is {asked}, which does not divide the models' attention widths "
            f"{sorted(widths)}; use a divisor of {math.gcd(*widths)}, or leave it out"
        )
    return asked


def relation_kl(
    student_BPD: Tensor, teacher_BPD: Tensor, mask_BP: Tensor, places_N: Tensor, *, num_heads: int
) -> Tensor:
    """Returns the mean KL(teacher || student) of attention relations.

    The mean is taken over relation heads and real positions. A relation says how one position
    relates to all others: softmax(x x^T / sqrt(D / A)). The widths of the two models may differ.
    `places_N` are the numbers of the true entries of `mask_BP`, so that the host need not count them.

    Source: Wang et al., arXiv:2012.15828.
    """
    log_q_BAPP = _relations(student_BPD, mask_BP, num_heads)
    log_p_BAPP = _relations(teacher_BPD, mask_BP, num_heads)
    kl_BAP = (log_p_BAPP.exp() * (log_p_BAPP - log_q_BAPP)).sum(dim=-1)
    return kl_BAP.transpose(1, 2).flatten(0, 1).index_select(0, places_N).mean()


def _relations(x_BPD: Tensor, mask_BP: Tensor, num_heads: int) -> Tensor:
    x_BAPD = x_BPD.view(*x_BPD.shape[:-1], num_heads, -1).transpose(1, 2)
    scores_BAPP = x_BAPD @ x_BAPD.transpose(2, 3) / math.sqrt(x_BAPD.shape[-1])
    return torch.log_softmax(scores_BAPP.masked_fill(~mask_BP[:, None, None, :], NO_KEY), dim=-1)


def _width(module: Any) -> int:  # Any: Conv1D is untyped
    return int(module.out_features if isinstance(module, nn.Linear) else module.nf)
