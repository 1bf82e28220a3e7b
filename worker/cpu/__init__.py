"""Fast paths on a CPU: packed weights, fused decoding and training operations, and C kernels.

The other packages of the worker import from here only. A test in tests/test_architecture.py
enforces this.

- `prepare_for_training`, `prepare_for_inference`, `prepare_for_serving` and `fuse_layers` switch
  the layers of a model.
- `loss_kernel` computes the distillation loss and its gradient from logits.
- `matmul` and `weight_gradient` are the matmuls of the LM head and of layer fitting.
- The other names are layer classes and attention functions for code that extends them.
"""

from worker.cpu.int8 import HAS_INT8
from worker.cpu.linear_ops import (
    HAS_BFLOAT16,
    HAS_FAST_BFLOAT16,
    TRAINS_IN_BFLOAT16,
    OneDnnConv1D,
    OneDnnLinear,
    linear,
    matmul,
    weight_gradient,
)
from worker.cpu.llama_decoder import LlamaDecoder, is_llama_like
from worker.cpu.loss_kernel import LossKernel, loss_kernel
from worker.cpu.model_preparation import (
    fuse_layers,
    prepare_for_inference,
    prepare_for_serving,
    prepare_for_training,
)
from worker.cpu.short_attention import NAME as SHORT_ATTENTION
from worker.cpu.short_attention import Attended, attending, attention, attention_gradients

__all__ = [
    "HAS_BFLOAT16",
    "HAS_FAST_BFLOAT16",
    "HAS_INT8",
    "SHORT_ATTENTION",
    "TRAINS_IN_BFLOAT16",
    "Attended",
    "LlamaDecoder",
    "LossKernel",
    "OneDnnConv1D",
    "OneDnnLinear",
    "attending",
    "attention",
    "attention_gradients",
    "fuse_layers",
    "is_llama_like",
    "linear",
    "loss_kernel",
    "matmul",
    "prepare_for_inference",
    "prepare_for_serving",
    "prepare_for_training",
    "weight_gradient",
]
