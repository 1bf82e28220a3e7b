"""Tracks the bytes of live GPU tensors, for code that runs inside `fake_cuda`.

PyTorch's MemTracker cannot do this here: it registers hooks on all parameters, and those of the
teacher need no gradient.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

aten = torch.ops.aten
BLOCK_BYTES = 512  # PyTorch's allocator rounds up to this


class MemoryLog(TorchDispatchMode):
    """Tracks GPU memory within its block, which must be inside `fake_cuda`.

    `peak_bytes` is the largest sum of the storages that were alive at one time. Tensors from before
    the block count if they were given to `watch`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}  # by the number of the storage

    def watch(self, tensors: Iterator[Tensor]) -> None:
        """Counts tensors as live until their memory is freed."""
        for tensor in tensors:
            if tensor.device.type != "cuda":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._sizes:
                continue
            size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
            self._sizes[key] = size
            self.live_bytes += size
            weakref.finalize(storage, self._free, key)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _free(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:  # Any: PyTorch leaves the signature open
        """Runs one operation and counts its results. Reads return 1, as fake tensors have no values."""
        if func is aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            return 1.0 if args[0].is_floating_point() else 1
        result = func(*args, **(kwargs or {}))
        self.watch(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


@contextmanager
def fused_attention() -> Iterator[None]:
    """Makes attention use the operators that a GPU would choose. A CPU build chooses the plain path."""
    with (
        patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        # transformers takes fake positions for packed sequences, and creates masks
        patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
    ):
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Returns the attention by flash attention, or with a mask or float32 by the other kernel."""
    assert dropout_p == 0.0
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(  # type: ignore[no-any-return]
            query, key, value, 0.0, is_causal, scale=scale
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                ~attn_mask, lowest
            )
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if enable_gqa:
        num_groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(num_groups, 1) for tensor in (key, value))
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, attn_mask, needs_grad, 0.0, is_causal, scale=scale
    )[0]
