"""Forward pass of Llama-like models without their module tree: same arithmetic, fewer operations.

On a CPU, the Python overhead of a Hugging Face module tree exceeds the matmuls of one row
(bench/LOG.md). Here mask, cosines and sines are computed once per call, and key heads are not
repeated for the query heads that share them. Some sums are taken in another order, so logits differ
by rounding.
"""

# N rows, Q tokens per row in this call, W columns of the window, E hidden size, V vocabulary,
# M rows times key heads; a layer has H query heads and K key heads (H = K * G) of width D
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.contracts.architectures import ARCHITECTURES
from worker.cpu.fused_decoder import FusedDecoder
from worker.cpu.kernels.bindings import Kernels, kernels
from worker.cpu.linear_ops import multiplier, packed_weight

FIRST_POSITIONS = 2048  # smallest number of positions in the table of rotations
LLAMA_LIKE = frozenset(a.model_type for a in ARCHITECTURES.values() if a.has_llama_decoder)

Model = Any  # transformers is untyped here
Multiply = Callable[[Tensor], Tensor]


def is_llama_like(model: Model) -> bool:
    """Returns whether LlamaDecoder implements everything that the model computes."""
    config = model.config
    if config.model_type not in LLAMA_LIKE or config.hidden_act != "silu":
        return False
    is_sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return not is_sliding and (config.model_type != "mistral" or config.sliding_window is None)


@torch.no_grad()
def fuse_projections(model: Model) -> None:
    """Replaces the query, key and value projections by one layer, which is faster for few rows.

    Afterwards the model can only be called through LlamaDecoder.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        weight_OI = torch.cat([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        fused = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bool(biases), device="meta")
        fused.weight = nn.Parameter(weight_OI, requires_grad=False)
        if biases:
            fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        attention.qkv_proj = fused
        attention.q_proj = attention.k_proj = attention.v_proj = None


def has_refined_head(model: Model) -> bool:
    """Returns whether the LM head may be packed in bfloat16.

    `head_of` then recomputes the highest logits in float32.
    """
    return (
        is_llama_like(model)
        and kernels() is not None
        and model.get_output_embeddings().bias is None
    )


def head_of(model: Model) -> Multiply:
    """Returns the function from hidden states [N, …, E] to float32 logits [N, …, V]."""
    head, ops = model.get_output_embeddings(), kernels()
    packed = packed_weight(head)
    if ops is None or packed is None or packed.dtype != torch.bfloat16:
        exact: Multiply = head
        return exact

    def refined(hidden: Tensor) -> Tensor:
        """Returns bfloat16 logits as float32, with the highest ones recomputed in float32."""
        hidden_NE = hidden.reshape(-1, hidden.shape[-1]).contiguous()  # a slice is strided
        logits_NV = ops.refine(packed.matmul(hidden_NE, None), hidden_NE, head.weight)
        return logits_NV.view(*hidden.shape[:-1], -1)

    return refined


# most tokens per row in one call of the attention kernel; PyTorch handles longer prompts in blocks
MOST_TOKENS = 1024


class LlamaDecoder:
    """Runs the layers of a model one by one, or all in one kernel call where that is possible.

    The weights stay in the model. Those that are not packed may change between calls.
    """

    def __init__(self, model: Model) -> None:
        body = model.model
        self._embed, self._rotary, self._norm = body.embed_tokens, body.rotary_emb, body.norm
        self._head = head_of(model)
        self._layers = [_Layer(layer) for layer in body.layers]
        # with these two types, all angles depend on the longest position of a call
        self._is_fixed = getattr(self._rotary, "rope_type", None) not in ("dynamic", "longrope")
        self._table: tuple[Tensor, Tensor] | None = None
        self._kernels = kernels() if all(layer.has_few_parts for layer in self._layers) else None
        self._fused = None
        if self._kernels is not None and FusedDecoder.knows(body.layers):
            self._fused = FusedDecoder(self._kernels, body.layers, self._norm)

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """dtype of the KV cache: bfloat16 if the kernels read it, else None (the model's own).

        The layers round the operands of their matmuls to bfloat16 anyway.
        """
        rounds_to = self._layers[0].rounds_to
        return rounds_to if self._kernels is not None and rounds_to == torch.bfloat16 else None

    def call(self, _: Model, call: Any) -> Tensor:
        """Returns the logits, through the interface that all model families have."""
        return self.logits(call)

    def logits(self, call: Any) -> Tensor:  # Any: families.Call, an import cycle
        """Returns the logits of the last tokens: [N, V], or [N, num_logits, V] if several."""
        hidden_NQE = self._embed(call.tokens_NQ)
        if self._kernels is not None:
            return self._head(self._compiled(self._kernels, hidden_NQE, call)).squeeze(1)
        seen = _see(call, self._rotary(hidden_NQE, call.positions_NQ), hidden_NQE.dtype)
        for index, layer in enumerate(self._layers):
            hidden_NQE = layer.forward(hidden_NQE, seen, call.cache, index)
        return self._head(_normed(self._norm, hidden_NQE[:, -call.num_logits :])).squeeze(1)

    def _compiled(self, ops: Kernels, hidden_NQE: Tensor, call: Any) -> Tensor:
        """Returns the final norm [N, num_logits, E] of the last tokens, computed by the kernels."""
        hidden_ME = hidden_NQE.view(-1, hidden_NQE.shape[-1])
        num_tokens, rotations = hidden_NQE.shape[1], self._rotations(hidden_NQE, call)
        if rotations is None or call.starts_N is None or num_tokens > MOST_TOKENS:
            attend = self._by_torch(hidden_NQE, call)
        else:
            first = self._layers[0]
            like_NKWD = hidden_NQE.new_empty(1, first.num_heads[1], 1, first.head_width)
            call.cache.open_layers(len(self._layers), like_NKWD)
            if self._fused is not None:
                return self._fused(hidden_ME, rotations, call).view_as(hidden_NQE)[
                    :, -call.num_logits :
                ]
            attend = self._by_kernels(ops, rotations, call)
        norms = [layer.before_attention for layer in self._layers[1:]] + [self._norm]
        normed = _added(
            ops, hidden_ME, None, self._layers[0].before_attention, self._layers[0].rounds_to
        )
        for index, (layer, norm) in enumerate(zip(self._layers, norms, strict=True)):
            attended = layer.output(attend(layer.projected(normed), layer, index))
            normed = _added(ops, hidden_ME, attended, layer.before_mlp, layer.rounds_to)
            more = layer.down(ops.multiply(layer.gate(normed), layer.up(normed)))
            dtype = hidden_ME.dtype if norm is self._norm else layer.rounds_to
            normed = _added(ops, hidden_ME, more, norm, dtype)
        return normed.view_as(hidden_NQE)[:, -call.num_logits :]

    def _by_kernels(
        self, ops: Kernels, rotations_MD: tuple[Tensor, Tensor], call: Any
    ) -> "_Attend":
        return lambda projected, layer, index: ops.attend(
            projected,
            rotations_MD if layer.is_rotated else None,
            call.cache.layers[index].whole,
            call.starts_N,
            num_heads=layer.num_rotated[0],
            column=call.cache.window.column,
            scaling=layer.scaling,
        )

    def _by_torch(self, hidden_NQE: Tensor, call: Any) -> "_Attend":
        seen = _see(call, self._rotary(hidden_NQE, call.positions_NQ), hidden_NQE.dtype)
        N, Q, _ = hidden_NQE.shape

        def attend(projected_MP: Tensor, layer: "_Layer", index: int) -> Tensor:
            """Returns the attention output [M, H * D] of one layer, computed by PyTorch."""
            projected_NQP = projected_MP.to(hidden_NQE.dtype).view(N, Q, -1)
            attended_NQE = layer.attention(projected_NQP, seen, call.cache, index)
            return attended_NQE.view(N * Q, -1).to(layer.rounds_to)

        return attend

    def _rotations(self, hidden_NQE: Tensor, call: Any) -> tuple[Tensor, Tensor] | None:
        """Returns cosines and sines [N * Q, D], with the first half of the sines negated.

        They are looked up in a table if they depend on the position alone. None means that PyTorch
        must compute them.
        """
        positions_M = call.positions_NQ.flatten()
        if not self._is_fixed:
            # the longest position of a prompt changes all angles: left to PyTorch
            return (
                self._rotated_at(hidden_NQE, positions_M[None])
                if hidden_NQE.shape[1] == 1
                else None
            )
        if self._table is None or call.cache.window.end > len(self._table[0]):
            self._table = self._rotated_at(
                hidden_NQE, torch.arange(_table_size(call.cache.window.end))[None]
            )
        cos, sin = (table[positions_M] for table in self._table)
        return cos, sin

    def _rotated_at(self, like: Tensor, positions_1P: Tensor) -> tuple[Tensor, Tensor]:
        cos_PD, sin_PD = (each[0].contiguous() for each in self._rotary(like[:1], positions_1P))
        sin_PD[:, : sin_PD.shape[-1] // 2].neg_()
        return cos_PD, sin_PD


def _table_size(num_positions: int) -> int:
    """Returns a power of two, so that the table grows by doubling."""
    return 1 << max(FIRST_POSITIONS, num_positions).bit_length()


def _added(
    ops: Kernels, hidden_NE: Tensor, more_NE: Tensor | None, norm: Any, dtype: torch.dtype
) -> Tensor:
    return ops.add_norm(hidden_NE, more_NE, norm.weight, norm.variance_epsilon, dtype)


@dataclass(frozen=True)
class _Seen:
    """Inputs that all layers of one call share: rotations [N, Q, 1, D] and attention masks."""

    cos: Tensor
    sin: Tensor  # first half negated, so that `_rotated` only has to swap the halves
    is_visible: Tensor | None  # [N, 1, Q, W]; None: all keys are visible
    bias_N11W: Tensor | None  # for one token per row: added to its scores


def _see(call: Any, rotations: tuple[Tensor, Tensor], dtype: torch.dtype) -> _Seen:
    cos, sin = (each[:, :, None] for each in rotations)
    sin = sin.clone()
    sin[..., : sin.shape[-1] // 2].neg_()
    is_seen_NW = call.mask_NW.bool()
    num_tokens, width = call.tokens_NQ.shape[1], is_seen_NW.shape[1]
    if num_tokens > 1:
        is_past_QW = torch.ones(num_tokens, width, dtype=torch.bool, device=is_seen_NW.device)
        is_visible = is_seen_NW[:, None] & is_past_QW.tril_(width - num_tokens)
        # padding sees no key; its softmax would be NaN, so it is given all keys
        is_visible |= ~is_visible.any(-1, keepdim=True)
        return _Seen(cos, sin, is_visible[:, None], None)
    if is_seen_NW.all():
        return _Seen(cos, sin, None, None)
    bias_NW = torch.zeros(is_seen_NW.shape, dtype=dtype, device=is_seen_NW.device)
    bias_NW.masked_fill_(~is_seen_NW, torch.finfo(dtype).min)
    return _Seen(cos, sin, None, bias_NW[:, None, None])


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before_attention, self.before_mlp = (
            layer.input_layernorm,
            layer.post_attention_layernorm,
        )
        fused = getattr(attention, "qkv_proj", None)
        parts = (
            [fused] if fused is not None else [attention.q_proj, attention.k_proj, attention.v_proj]
        )
        self.projections = [multiplier(part) for part in parts]
        self.output = multiplier(attention.o_proj)
        self.gate, self.up = multiplier(mlp.gate_proj, "swish"), multiplier(mlp.up_proj)
        self.down = multiplier(mlp.down_proj)
        packed = packed_weight(mlp.down_proj)
        self.is_packed = packed is not None
        # inputs are rounded once for all matmuls that share them;
        # sums, norms and attention keep the model's dtype
        self.rounds_to = mlp.down_proj.weight.dtype if packed is None else packed.dtype
        self.query_norm = getattr(attention, "q_norm", None)
        self.key_norm = getattr(attention, "k_norm", None)
        self.is_rotated: bool = getattr(attention, "use_rope", True)
        self.head_width: int = attention.head_dim
        self.scaling: float = attention.scaling
        num_key_heads: int = attention.config.num_key_value_heads
        num_query_heads = num_key_heads * attention.num_key_value_groups
        self.num_rotated = [num_query_heads, num_key_heads]
        self.num_heads = [*self.num_rotated, num_key_heads]

    @property
    def has_few_parts(self) -> bool:
        """True if the packed matmuls and the kernels cover a whole decode step of this layer."""
        return self.is_packed and self.query_norm is None

    def projected(self, normed: Tensor) -> Tensor:
        """Returns queries, keys and values, concatenated along the last dimension."""
        parts = [multiply(normed) for multiply in self.projections]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def forward(self, hidden_NQE: Tensor, seen: _Seen, cache: Any, index: int) -> Tensor:
        """Returns the input of the next layer, computed in place."""
        normed = _normed(self.before_attention, hidden_NQE).to(self.rounds_to)
        attended = self.attention(self.projected(normed).to(hidden_NQE.dtype), seen, cache, index)
        hidden_NQE = hidden_NQE.add_(self.output(attended))
        normed = _normed(self.before_mlp, hidden_NQE).to(self.rounds_to)
        return hidden_NQE.add_(self.down(self.gate(normed).mul_(self.up(normed))))

    def attention(self, projected_NQP: Tensor, seen: _Seen, cache: Any, index: int) -> Tensor:
        """Returns the attention output [N, Q, H * D] for concatenated queries, keys and values."""
        every = projected_NQP.view(*projected_NQP.shape[:2], -1, self.head_width)
        if self.query_norm is None:
            both, value = torch.split(every, [sum(self.num_rotated), self.num_rotated[1]], dim=2)
        else:
            query, key, value = torch.split(every, self.num_heads, dim=2)
            both = torch.cat((_normed(self.query_norm, query), _normed(self.key_norm, key)), dim=2)
        if self.is_rotated:
            both = _rotated(both, seen)
        query, key = torch.split(both, self.num_rotated, dim=2)
        keys, values = cache.update(key.transpose(1, 2), value.transpose(1, 2), index)
        return self._attend(query, keys, values, seen)

    def _attend(
        self, query_NQHD: Tensor, keys_NKWD: Tensor, values_NKWD: Tensor, seen: _Seen
    ) -> Tensor:
        N, Q, H, D = query_NQHD.shape
        K, W = keys_NKWD.shape[1:3]
        keys_NKWD, values_NKWD = keys_NKWD.to(query_NQHD.dtype), values_NKWD.to(query_NQHD.dtype)
        if Q > 1:
            attended_NHQD = nn.functional.scaled_dot_product_attention(
                query_NQHD.transpose(1, 2),
                keys_NKWD,
                values_NKWD,
                attn_mask=seen.is_visible,
                scale=self.scaling,
                enable_gqa=True,
            )
            return attended_NHQD.transpose(1, 2).reshape(N, Q, H * D)
        query_MGD, keys_MWD = query_NQHD.reshape(N * K, H // K, D), keys_NKWD.reshape(N * K, W, D)
        none = query_MGD.new_empty(1, 1, 1)
        scores_MGW = torch.baddbmm(none, query_MGD, keys_MWD.mT, beta=0, alpha=self.scaling)
        if seen.bias_N11W is not None:
            scores_MGW.view(N, K, -1, W).add_(seen.bias_N11W)
        weights_MGW = torch.softmax(scores_MGW, dim=-1)
        return torch.bmm(weights_MGW, values_NKWD.reshape(N * K, W, -1)).view(N, 1, -1)


# from a layer's projections [M, P] to its attention output [M, H * D], in the dtype of its matmuls
_Attend = Callable[[Tensor, _Layer, int], Tensor]


def _normed(norm: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        normed: Tensor = norm(x)  # sums in float32; families differ in how they cast back
        return normed
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotated(x_NQHD: Tensor, seen: _Seen) -> Tensor:
    return (x_NQHD * seen.cos).addcmul_(x_NQHD.roll(x_NQHD.shape[-1] // 2, -1), seen.sin)
