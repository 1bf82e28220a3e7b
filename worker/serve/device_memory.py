"""Memory of the device that serves: its limit, the size of a prefill, and exhausted memory."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

DEFAULT_CPU_BYTES: Final = 4 * 2**30
# Share of the free memory of a CUDA device for models and their KV caches. The rest is for
# activations and for the allocator.
CUDA_SHARE: Final = 0.85
# Share of the memory that is free before a prefill for its activations.
PREFILL_SHARE: Final = 0.5
# Tokens of one forward pass of a prefill. Fewer would not use a GPU well, and more would let the
# sequences that run wait for long.
LEAST_PREFILL_TOKENS: Final = 256
MOST_PREFILL_TOKENS: Final = 8192
# Names of the width of the feed-forward part in configs. Without one it is 4 H.
MLP_SIZES: Final = ("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "n_inner")
# Allocation failures that are not of a class of their own: of PyTorch's CPU allocator, and cuBLAS.
MESSAGES: Final = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def resident_bytes(limit_bytes: int, device: str) -> int:
    """Returns the limit of a serve worker for its models and their KV caches.

    If `limit_bytes` is 0, it follows the device: a share of the free memory of a CUDA device, or
    `DEFAULT_CPU_BYTES` on a CPU.
    """
    if limit_bytes:
        return limit_bytes
    if device == "cpu":
        return DEFAULT_CPU_BYTES
    free_bytes, _ = torch.cuda.mem_get_info()
    return int(CUDA_SHARE * free_bytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation has failed, on a CPU or on a CUDA device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


def release_unused() -> None:
    """Returns memory that PyTorch keeps for later tensors to the CUDA device."""
    torch.cuda.empty_cache()  # does nothing if CUDA is not initialised


@dataclass(frozen=True)
class PrefillMemory:
    """Memory of the activations of a prefill on a CUDA device, per token that it reads.

    token_bytes: Of the layer that is being computed. Logits are computed for the last token only.
    column_bytes: Of the mask, or of the scores with a position bias, per column of a row.
    """

    token_bytes: int
    column_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> "PrefillMemory":
        """Returns the memory of a model, from its config."""
        whole: Any = model.config  # transformers is untyped here
        config = whole.get_text_config(decoder=True)
        value_bytes = next(model.parameters()).dtype.itemsize
        num_heads = config.num_attention_heads
        num_key_heads = getattr(config, "num_key_value_heads", None) or num_heads
        sizes = [getattr(config, name, None) for name in MLP_SIZES]
        mlp_size = next((size for size in sizes if size), 4 * config.hidden_size)
        # The MLP has most: its input and the residual stream, two of its results and their product.
        # The residual stream exists in float32, too, in an RMS norm.
        token_bytes = value_bytes * (3 * mlp_size + 4 * config.hidden_size)
        if whole.is_encoder_decoder:
            return cls(token_bytes, 2 * value_bytes * num_heads)
        # The mask is repeated for the queries of a key head, as booleans and as numbers.
        num_repeats = num_heads // num_key_heads
        return cls(token_bytes, 1 + num_repeats * (1 + value_bytes))

    def num_tokens(self, num_columns: int) -> int:
        """Returns how many tokens of rows with so many columns fit the memory that is free now."""
        return self.num_tokens_in(usable_bytes(), num_columns)

    def num_tokens_in(self, free_bytes: int, num_columns: int) -> int:
        """Returns how many tokens fit a share of `free_bytes`, within the limits above."""
        num_tokens = int(PREFILL_SHARE * free_bytes) // self.num_bytes(1, num_columns)
        return max(LEAST_PREFILL_TOKENS, min(MOST_PREFILL_TOKENS, num_tokens))

    def num_bytes(self, num_tokens: int, num_columns: int) -> int:
        """Returns the memory of so many tokens, in rows with so many columns."""
        return num_tokens * (self.token_bytes + num_columns * self.column_bytes)


def usable_bytes() -> int:
    """Returns the free memory of the CUDA device, with what PyTorch keeps for later tensors."""
    free_bytes, _ = torch.cuda.mem_get_info()
    return free_bytes + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
