"""Fused decoder: runs all layers of a decode step in one kernel call (kernels/decoder_layers.c).

Weights are tiled; keys and values are bfloat16.

N rows of Q tokens each, M = N * Q; E hidden size, D head width.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from worker.cpu.int8 import TiledInt8Weight
from worker.cpu.kernels.bindings import Kernels, Layer, Sizes
from worker.cpu.linear_ops import TiledWeight, packed_weight


class FusedDecoder:
    """Decoder layers of a model as an array of C structures, run by one kernel call.

    The structures hold addresses. Packed weights and biases are kept alive here, norm weights by
    the model.
    """

    def __init__(
        self, ops: Kernels, layers: Sequence[Any], norm: Any
    ) -> None:  # Any: each family has its own classes
        self._ops, self._norm = ops, norm
        self._kept: list[Tensor] = []
        self._layers = (Layer * len(layers))(*(self._layer(layer) for layer in layers))
        attention: Any = layers[0].self_attn
        config, mlp = attention.config, layers[0].mlp
        self._sizes = Sizes(
            E=config.hidden_size,
            H=config.num_key_value_heads * attention.num_key_value_groups,
            K=config.num_key_value_heads,
            D=attention.head_dim,
            I=mlp.gate_proj.out_features,
            is_int8=isinstance(packed_weight(mlp.gate_proj), TiledInt8Weight),
        )

    @staticmethod
    def knows(layers: Sequence[Any]) -> bool:
        """Returns whether the kernel supports these layers.

        All weights must be tiled with one dtype, and queries, keys and values must share one
        weight.
        """
        weights = [packed_weight(part) for layer in layers for part in _parts(layer)]
        return (
            all(isinstance(weight, TiledWeight) for weight in weights)
            and len(set(map(type, weights))) == 1
        )

    def __call__(self, hidden_ME: Tensor, rotations_MD: tuple[Tensor, Tensor], call: Any) -> Tensor:
        """Returns the final RMS norm of the hidden states, [M, E].

        Overwrites `hidden_ME`. Writes the new keys and values into the cache at the window's
        column.
        """
        for layer, kept in zip(self._layers, call.cache.layers, strict=True):
            layer.keys, layer.values = kept.addresses
        window, sizes = call.cache.window, self._sizes
        sizes.N = len(call.starts_N)
        sizes.Q = len(hidden_ME) // sizes.N
        sizes.width, sizes.column = window.width, window.column
        return self._ops.forward(
            self._layers,
            sizes,
            hidden_ME,
            rotations_MD,
            call.starts_N,
            self._norm.weight,
            self._norm.variance_epsilon,
        )

    def _layer(self, layer: Any) -> Layer:
        before, between = layer.input_layernorm, layer.post_attention_layernorm
        made = Layer(
            attention_norm=before.weight.data_ptr(),
            mlp_norm=between.weight.data_ptr(),
            attention_eps=before.variance_epsilon,
            mlp_eps=between.variance_epsilon,
            scaling=layer.self_attn.scaling,
            is_rotated=getattr(layer.self_attn, "use_rope", True),
        )
        for name, part in zip(Layer.WEIGHTS, _parts(layer), strict=True):
            setattr(made, name, self._address(part.packed.tensor))
            if part.bias is not None:
                setattr(made, f"{name}_bias", self._address(part.bias.float()))
        return made

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _parts(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = getattr(attention, "qkv_proj", None)
    return (qkv, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
